"""What a transformers configuration says about the cost of attention."""

from __future__ import annotations

from transformers import PreTrainedModel

from packflex.metrics import AttentionShape


def attention_shape(model: PreTrainedModel) -> AttentionShape | None:
    """Windows and width of a model's attention layers, or None where its FLOPs cannot be told from its configuration.

    None for mixtures of experts, whose active weights differ from token to token, and for configurations that do not
    name their heads: an MFU must not be made up.
    """
    config = model.config.get_text_config()
    experts = max(getattr(config, name, None) or 1 for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if experts > 1 or not isinstance(heads, int) or not isinstance(layers, int):
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = window is not None and getattr(config, "use_sliding_window", True)
        windows: tuple[int | None, ...] = (window if windowed else None,) * layers
    else:
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return AttentionShape(windows, heads * head_dim)

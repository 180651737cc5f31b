"""What a transformers configuration says about the cost of attention."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from packflex.integrations._output_head import unwrapped
from packflex.metrics import AttentionShape, matmul_flops


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


def token_cost(model: Any) -> float:
    """Work of a token outside attention over that of a pair inside it, for `packflex.packing.row_costs`.

    6 FLOPs a weight and token (4 where it is frozen) against 12 * L * d / 2 a causal pair of a document, that is
    N / (L * d) where all N weights are trained. 0, which balances attention alone, where the model's shape cannot be
    told.

    Args:
        model: a transformers model, or one wrapped by peft.
    """
    inner = unwrapped(model)
    shape = attention_shape(inner)
    if shape is None:
        return 0.0
    return matmul_flops(inner) / (6 * len(shape.windows) * shape.width)

"""Which transformers architectures can be packed by attention alone, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_RECURRENT = "a recurrent state runs along the row and carries one document into the next"
_CONVOLUTION = "a convolution along the row reads the last tokens of the document before"
_SPARSE = "the layer picks its keys itself, from the whole row"

# Layer types of `config.layer_types` and `config.layers_block_type`, present and past names.
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
_POINTWISE_LAYERS = frozenset({"mlp", "moe", "dense", "sparse"})
_LAYER_REASONS = {
    "linear_attention": _RECURRENT,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "recurrent": _RECURRENT,
    "hybrid": _RECURRENT,
    "hybrid_sliding": _RECURRENT,
    "conv": _CONVOLUTION,
    "chunked_attention": "its chunks are counted from the start of the row, not of the document",
    "indexed_attention": _SPARSE,
    "compressed_sparse_attention": _SPARSE,
    "heavily_compressed_attention": _SPARSE,
    "minimax_m3_sparse": _SPARSE,
}

# Architectures that mix tokens elsewhere in every configuration, whatever their layer types say.
_MODEL_REASONS = {
    "bamba": _RECURRENT,
    "falcon_h1": _RECURRENT,
    "falcon_mamba": _RECURRENT,
    "jamba": _RECURRENT,
    "kimi_linear": _RECURRENT,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "minimax": _RECURRENT,
    "nemotron_h": _RECURRENT,
    "olmo_hybrid": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "recurrent_gemma": _RECURRENT,
    "rwkv": _RECURRENT,
    "xlstm": _RECURRENT,
    "zamba": _RECURRENT,
    "zamba2": _RECURRENT,
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "llama4_text": _LAYER_REASONS["chunked_attention"],
    "deepseek_v32": _SPARSE,
    "deepseek_v4": _SPARSE,
    "doge": _SPARSE,
    "glm_moe_dsa": _SPARSE,
}

_REMEDY = "Fine-tune it on padded batches of one document a row"


def check_supported(model: PreTrainedModel | PretrainedConfig) -> None:
    """Refuse architectures whose documents mix outside attention, where no mask can keep them apart.

    Verified against each document alone: Llama, Qwen3, Gemma 2, Gemma 3 (text), Mistral, SmolLM3, OLMo 3 and gpt-oss.
    Other decoders pass when their layers are full or sliding attention and they use transformers' attention interface;
    `packflex.testing.leaks.check_leaks` tells whether they keep documents apart.

    Args:
        model: a transformers model, or its configuration. With a model, its modules are looked at as well.

    Raises:
        NotImplementedError: with the architecture, the layers and the reason.
        TypeError: neither a transformers model nor a configuration.
    """
    if isinstance(model, PreTrainedModel):
        config, name = model.config, type(model).__name__
    elif isinstance(model, PretrainedConfig):
        config, name = model, type(model).__name__
    else:
        raise TypeError(f"expected a transformers model or configuration; got {type(model).__name__}")
    label = f"{name} (model_type {config.model_type!r})"
    if config.is_encoder_decoder:
        raise NotImplementedError(
            f"{label} cannot be packed: a layout describes one row of tokens, and an encoder-decoder has two. {_REMEDY}"
        )
    media = [key for key in config.sub_configs if key not in ("text_config", "decoder", "backbone_config")]
    if media:
        raise NotImplementedError(
            f"{label} cannot be packed: it also reads {', '.join(media).replace('_config', '')} inputs, whose tokens "
            "have masks of their own. Load its text model (for Gemma 3: Gemma3ForCausalLM)"
        )
    text = config.get_text_config()
    types = list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [])
    wrong = [i for i, kind in enumerate(types) if kind not in _ATTENTION_LAYERS | _POINTWISE_LAYERS]
    if wrong:
        kind = types[wrong[0]]
        same = [i for i in wrong if types[i] == kind]
        reason = _LAYER_REASONS.get(kind, "packflex keeps documents apart in full and sliding attention only")
        raise NotImplementedError(f"{label} cannot be packed: {_layers(same)} {kind!r}: {reason}. {_REMEDY}")
    if text.model_type in _MODEL_REASONS:
        raise NotImplementedError(f"{label} cannot be packed: {_MODEL_REASONS[text.model_type]}. {_REMEDY}")
    if isinstance(model, PreTrainedModel):
        _check_modules(model, label)


def _check_modules(model: PreTrainedModel, label: str) -> None:
    for path, module in _mixing_modules(model):
        raise NotImplementedError(
            f"{label} cannot be packed: {path} is a {type(module).__name__}: {_CONVOLUTION}. {_REMEDY}"
        )
    if not model._supports_attention_backend:
        raise NotImplementedError(
            f"{label} cannot use packflex: its layers do not hand their attention to transformers' AttentionInterface"
        )


def _mixing_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.RNNBase))


def _layers(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:4])) + (", ..." if len(indices) > 4 else "")
    return f"layer {shown} is" if len(indices) == 1 else f"layers {shown} are"

"""Tiny models with random weights of every transformers family that packflex is verified on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96

_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

# model_type -> what differs from the base; windows are shorter than the documents of the tests
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"use_sliding_window": True, **_ALTERNATING},
    "gemma2": {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0, **_ALTERNATING},
    "gemma3_text": {"query_pre_attn_scalar": 20, **_ALTERNATING},
    "mistral": {"sliding_window": 6},
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [1, 0], **_ALTERNATING},
    "olmo3": _ALTERNATING,
    # the length that its RoPE scaling is for
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 131072, **_ALTERNATING},
}


def tiny_model(family: str, attn_implementation: str = "eager", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of `family` whose weights are large enough for a leak to show: logits of about 1."""
    config = AutoConfig.for_model(family, **{**_BASE, **FAMILIES.get(family, {}), **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("sinks"):
                parameter.normal_(0, 0.15)
    return model.eval()

"""Where a transformers causal language model turns hidden states into logits, for losses that never hold the logits."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

# Families whose logits are `lm_head(decoder(...))`, softly capped where the configuration says so, and nothing else.
_PLAIN_HEADS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "olmo3", "gpt_oss"}
)


@dataclass(frozen=True)
class OutputHead:
    """A model's decoder (inputs to `last_hidden_state` [B, S, D]), output embedding, and cap of the logits."""

    decoder: nn.Module
    embedding: nn.Linear
    softcap: float | None


def output_head(model: nn.Module) -> OutputHead | str:
    """The parts of a causal language model, or why they cannot be had.

    Args:
        model: a transformers model, or one wrapped by peft.
    """
    inner = unwrapped(model)
    kind = getattr(getattr(inner, "config", None), "model_type", None)
    if kind not in _PLAIN_HEADS:
        known = ", ".join(sorted(_PLAIN_HEADS))
        return f"{type(inner).__name__} is none of the families with a plain output head: {known}"
    embedding = inner.get_output_embeddings()
    if hasattr(embedding, "base_layer"):
        return f"its output embedding carries adapters ({type(embedding).__module__}), which the loss would leave out"
    if type(embedding) is not nn.Linear:
        return f"its output embedding is a {type(embedding).__name__}, not a plain Linear layer"
    return OutputHead(inner.get_decoder(), embedding, getattr(inner.config, "final_logit_softcapping", None))


def has_router_loss(model: nn.Module) -> bool:
    """Whether a mixture of experts is asked for its routers' auxiliary loss, which is added to that of its logits."""
    inner = unwrapped(model)
    config: Any = getattr(inner, "config", None)
    if not hasattr(config, "get_text_config"):
        return False
    settings = config.get_text_config().to_dict()
    share = getattr(inner, "router_aux_loss_coef", settings.get("router_aux_loss_coef"))
    # other mixtures, and dense models, have the switch too, and add nothing
    adds = hasattr(sys.modules.get(type(inner).__module__), "load_balancing_loss_func")
    return adds and bool(settings.get("output_router_logits")) and share != 0


def unwrapped(model: nn.Module) -> Any:
    """The transformers model of one that peft has wrapped; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]

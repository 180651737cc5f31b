"""`attn_implementation="packflex"`: packed batches in Hugging Face causal language models.

Importing this module registers packflex with transformers' `AttentionInterface` and `AttentionMaskInterface`. Then::

    import packflex.integrations.transformers as packflex_transformers

    model = AutoModelForCausalLM.from_pretrained(name)
    packflex_transformers.enable_packflex(model)
    model(**batch)  # batch = dict(input_ids, labels, position_ids, packed=PackedLayout)

transformers hands keywords it does not know to every attention layer, so one `packed=` object reaches them all and
nothing is guessed from position ids. With `packed`, each document attends to itself alone and tokens of a padded tail
attend to nothing. Without it (evaluation of padded batches, `generate`, a KV cache) the model's ordinary masks are
honoured.

`from_pretrained(..., attn_implementation="packflex")` without `enable_packflex` works too, for batches that hold
`position_ids`. What `enable_packflex` adds on a packed call:

- the model is checked: architectures that mix tokens outside attention are refused by name;
- `position_ids` that are missing are filled in from the layout;
- no S x S mask is built. transformers does not know that nobody will read it: [B, 1, S, S] booleans and several
  temporaries of that size, 512 MiB each for 8 rows of 8192, and without a cache one wait for the device;
- an `attention_mask` that the layout was made from (`packed_from_mask=True` says so) is left to whoever counts tokens
  by it, and not handed on;
- `use_cache` left at its default is off: keys and values of a packed row would be copied into a cache that no
  `generate` can continue from;
- the choice of a backend belongs to the model.

And on every call of a compiled model, packed or not: the cosines and sines that a rotary embedding returns are computed
once, and not again in each layer's kernels.

In mixtures of experts the routers' auxiliary loss (`output_router_logits=True`) counts the tokens of a padded tail, as
it does without packflex when there is no `attention_mask`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from packflex.attention import flex_attention
from packflex.attention.api import BACKENDS
from packflex.integrations._ordinary import ordinary_attention
from packflex.integrations._rotary import keep_rotary_tables
from packflex.integrations._supported import check_supported
from packflex.layout import PackedLayout, is_on
from packflex.masks import document_mask
from packflex.parallel.attention import sharded_attention
from packflex.parallel.layout import ShardedLayout

__all__ = ["NAME", "check_supported", "enable_packflex", "packflex_attention", "packflex_mask", "transformers_models"]

NAME = "packflex"

# A mask that transformers built and packflex will not read is worth a word from here on.
_WASTED_MASK_BYTES = 64 * 2**20

# Configurations in which a window of W counts distances below W in both directions. transformers' general masks for
# bidirectional windows include distance W.
_EXCLUSIVE_WINDOWS = frozenset({"gemma3_text", "gemma3"})

# Decoders that hand `position_ids` to transformers' masks, which tell documents by them; gpt-oss and Falcon do not.
_BY_POSITIONS = frozenset(
    {
        "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "olmo3", "phi3",
        "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
    }
)  # fmt: skip


def enable_packflex(model: nn.Module, backend: str | None = None) -> None:
    """Make every transformers model inside `model` attend through packflex.

    Sets the attention implementation and registers one forward pre-hook on the body of each model (`LlamaModel`
    inside `LlamaForCausalLM`), which acts only when a call carries `packed`, and a forward hook on its rotary
    embeddings, which acts only in compiled code. Calling it again changes the backend and registers nothing twice.
    Call it before `torch.compile`, and on any module that holds the model: a LightningModule, a PEFT wrapper.

    Args:
        model: a transformers causal language model, or a module that contains one or more.
        backend: backend of `packflex.flex_attention` on packed calls: "hopper", "triton", "torch" or "reference"; None
            picks the best for the device. `model(..., packflex_backend="reference")` overrides it for one call.

    Raises:
        ValueError: an unknown backend, or no transformers model inside `model`.
        NotImplementedError: a model whose documents cannot be kept apart in attention alone; see `check_supported`.

    Example:
        >>> enable_packflex(model)
        >>> layout = PackedLayout.from_lengths([[3, 5], [7]], seq_len=8)
        >>> model(input_ids=torch.randint(0, 100, (2, 8)), packed=layout).logits.shape
        torch.Size([2, 8, 128])
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None; got {backend!r}")
    found = transformers_models(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no transformers model; call enable_packflex on a module that does, or call "
            "packflex.flex_attention in your own attention layers"
        )
    for one in found:
        check_supported(one)
    for one in found:
        one.set_attn_implementation(NAME)
        if one.config._attn_implementation != NAME:
            raise NotImplementedError(
                f"{type(one).__name__} kept attn_implementation={one.config._attn_implementation!r}: it does not hand "
                "its attention to transformers' AttentionInterface"
            )
        keep_rotary_tables(one)
        for body in _bodies(one):
            hooks = [hook for hook in body._forward_pre_hooks.values() if isinstance(hook, _PackedCall)]
            if hooks:
                hooks[0].backend = backend
            else:
                body.register_forward_pre_hook(_PackedCall(backend), with_kwargs=True)


def transformers_models(module: nn.Module) -> list[PreTrainedModel]:
    """The outermost transformers models in `module`, itself included, each once."""
    if isinstance(module, PreTrainedModel):
        return [module]
    found: dict[PreTrainedModel, None] = {}
    for child in module.children():
        found.update(dict.fromkeys(transformers_models(child)))
    return list(found)


def blind_models(module: nn.Module, batch: Mapping[str, Any]) -> list[PreTrainedModel]:
    """The text models in `module` that may let the documents of a packed batch see one another.

    Not those whose attention function or whose own `forward` names `packed`, nor those inside a module that does. Nor
    those of `_BY_POSITIONS` that go by the batch's `position_ids`: without an `attention_mask` and a cache, which
    `use_cache=False` or gradient checkpointing in training leaves out.
    """
    blind = []
    for one in [] if _takes_layout(module.forward) else transformers_models(module):
        found = one.get_decoder()  # of a model that reads images too, what attends to text
        text = found if isinstance(found, PreTrainedModel) else one
        function = AttentionInterface().get(text.config._attn_implementation)
        reads = any(map(_takes_layout, (function, one.forward, text.forward)))
        if not reads and not (_hands_on(module, one) and _goes_by_positions(one, text, batch)):
            blind.append(text)
    return blind


def _hands_on(module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether `module` is the model, or torch.compile or peft around it, and gives it the batch as it is.

    Prompt and prefix tuning do not: they leave out positions or bring a cache.
    """
    inner: Any = getattr(module, "_orig_mod", module)
    settings = getattr(inner, "peft_config", {}).values()
    if hasattr(inner, "get_base_model") and not any(each.is_prompt_learning for each in settings):
        inner = inner.get_base_model()
    return inner is model


def _goes_by_positions(model: PreTrainedModel, text: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
    """Whether transformers' own masks keep the documents of the batch apart."""
    config, packed, positions = text.config, batch.get("packed"), batch.get("position_ids")
    if config.model_type not in _BY_POSITIONS or model.config.model_type != config.model_type:
        return False
    if config._attn_implementation not in ("eager", "sdpa", "flex_attention") or not _is_causal(text, None):
        return False
    if batch.get("attention_mask") is not None or batch.get("past_key_values") is not None:
        return False
    cached = config.use_cache if batch.get("use_cache") is None else batch["use_cache"]
    if cached and not (text.training and getattr(text, "gradient_checkpointing", False)):
        return False
    return isinstance(packed, PackedLayout) and positions is not None and torch.equal(positions, packed.position_ids)


def _takes_layout(function: Any) -> bool:
    return function is not None and "packed" in inspect.signature(function).parameters


def _bodies(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The modules that embed tokens and run the layers: `LlamaModel`, not the `LlamaForCausalLM` around it."""
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.base_model is m]


class _PackedCall:
    """Forward pre-hook that completes the arguments of a packed call; a class so that models pickle and deep-copy."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        packed, from_mask = kwargs.get("packed"), kwargs.get("packed_from_mask", False)
        if packed is None:
            return None
        if len(args) > 1:
            raise TypeError(
                f"{type(module).__name__} got packed and {len(args)} positional arguments; pass all but input_ids by "
                "keyword"
            )
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None  # the model says what is missing
        _check_layout(packed, (tokens.shape[0], tokens.shape[1]), tokens.device, "input tokens")
        if kwargs.get("attention_mask") is not None and not from_mask:
            raise ValueError(
                "packed and attention_mask were both given. The layout already says which tokens are padding (the "
                "tail of a row) and which belong together; drop attention_mask from the batch, or leave packed out to "
                "have the mask honoured"
            )
        kwargs = {name: value for name, value in kwargs.items() if name != "packed_from_mask"}
        kwargs["attention_mask"] = _placeholder_mask(packed, tokens.device)
        if kwargs.get("position_ids") is None:
            if isinstance(packed, ShardedLayout):
                raise ValueError("a sharded batch needs its position_ids: pass the whole batch that shard_batch made")
            kwargs["position_ids"] = _positions(packed)
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        if self.backend is not None:
            kwargs.setdefault("packflex_backend", self.backend)
        return args, kwargs


def _placeholder_mask(packed: PackedLayout | ShardedLayout, device: torch.device) -> Tensor:
    """A mask of no keys: transformers passes 4-D masks on as they are, so this keeps it from building a real one."""
    return torch.empty((packed.batch_size, 1, packed.seq_len, 0), dtype=torch.bool, device=device)


def _is_placeholder(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.shape[-1] == 0


def _positions(packed: PackedLayout) -> Tensor:
    """int64 [B, S] as `packed.position_ids`, from the mask's tensors: a compiled model must not read host lengths."""
    starts, ends = cast(Tensor, document_mask(packed).kv_intervals)
    token = torch.arange(packed.seq_len, device=starts.device)
    return torch.where(ends > starts, token - starts, 0)


def packflex_mask(**kwargs: Any) -> Tensor | None:
    """Mask function for `AttentionMaskInterface`: bool [B, 1, Q_LEN, KV_LEN], True where a key is seen.

    Always a real mask: transformers' own short cuts leave the pattern to `is_causal` flags, which packflex's
    attention function would have to guess back.
    """
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(**kwargs)


def packflex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    packed: PackedLayout | ShardedLayout | None = None,
    packflex_backend: str | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for `AttentionInterface`.

    Args:
        module: the attention layer that calls; its `is_causal` and its configuration's say whether attention is causal.
        query: [B, Hq, S, D], as transformers hands it: transposed, not contiguous.
        key: [B, Hkv, KV_LEN, D].
        value: [B, Hkv, KV_LEN, Dv].
        attention_mask: [B, 1, S, KV_LEN], boolean or additive; read only without `packed`.
        scaling: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight; must be 0 with `packed`.
        sliding_window: a query sees keys less than this many tokens before it.
        softcap: scores become `softcap * tanh(score / softcap)`.
        s_aux: [Hq], attention sinks.
        is_causal: overrides what the module says.
        packed: the layout of the batch: B rows of S tokens, or one rank's part of it.
        packflex_backend: backend of `flex_attention` for this call.
        position_ids: [B, S], looked at only to find out that they were forgotten.
        kwargs: what else a model hands to its attention.

    Returns:
        [B, S, Hq, Dv] and None for the weights, which are never formed.

    Raises:
        ValueError: a layout for another batch or device, dropout in a packed batch, forgotten position ids.
        TypeError: `packed` is no `PackedLayout`.
        NotImplementedError: a position bias or attention weights, which packflex does not compute.
    """
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} adds a position bias to its scores, which packflex does not take; use "
            'attn_implementation="sdpa" and padded batches'
        )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            'packflex never forms attention weights; for output_attentions=True use attn_implementation="eager"'
        )
    causal = _is_causal(module, is_causal)
    if packed is None:
        if _is_placeholder(attention_mask):
            raise RuntimeError(
                f"packed was given to the model and did not reach {type(module).__name__}: this architecture does not "
                "pass keywords on to its attention layers, so its documents cannot be kept apart"
            )
        out = ordinary_attention(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, s_aux, causal
        )
        return out, None

    batch, _, q_len, _ = query.shape
    _check_layout(packed, (batch, q_len), query.device, "queries")
    if key.shape[2] != q_len:
        raise ValueError(
            f"packed was given with {q_len} queries and {key.shape[2]} keys a row: a packed batch starts from nothing. "
            "Pass no past_key_values; generate from one document a row, padded on the left, without packed"
        )
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout} and packflex has none: set config.attention_dropout = 0 before building "
            "the model, or call model.eval()"
        )
    if isinstance(packed, ShardedLayout):
        out = sharded_attention(
            query, key, value, packed, causal=causal, window=_window(module, sliding_window, causal), scale=scaling,
            softcap=softcap, sinks=s_aux, backend=packflex_backend,
        )  # fmt: skip
        return out.transpose(1, 2), None
    if not _is_placeholder(attention_mask) and not torch.compiler.is_compiling():
        _check_direct_call(module, packed, attention_mask, position_ids)
    mask = document_mask(packed, causal=causal, window=_window(module, sliding_window, causal))
    out = flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        softcap=softcap,
        sinks=s_aux,
        backend=packflex_backend,
    )
    return out.transpose(1, 2), None


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    if is_causal is not None:
        return is_causal
    config = getattr(module, "config", None)
    return getattr(module, "is_causal", True) and getattr(config, "is_causal", True)


def _window(module: nn.Module, sliding_window: int | None, causal: bool) -> int | None:
    """packflex's window (distance below W) for a model's, which counts distance W too in most bidirectional ones."""
    if not sliding_window:
        return None
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return sliding_window if causal or model_type in _EXCLUSIVE_WINDOWS else sliding_window + 1


def _check_layout(packed: Any, rows: tuple[int, int], device: torch.device, what: str) -> None:
    if not isinstance(packed, PackedLayout | ShardedLayout):
        raise TypeError(f"packed must be a packflex.PackedLayout; got {type(packed).__name__}")
    if (packed.batch_size, packed.seq_len) != rows:
        raise ValueError(
            f"packed describes {packed.batch_size} rows of {packed.seq_len} tokens, the {what} are {rows[0]} rows of "
            f"{rows[1]}: pass the layout that was made with this batch"
        )
    if not is_on(device, packed.device):
        raise ValueError(
            f"packed is on {packed.device} and the {what} on {device}: move it with the batch, packed.to({device!s})"
        )


def _check_direct_call(
    module: nn.Module, packed: PackedLayout, attention_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    """What `enable_packflex` would have seen to, on a model that only had its attention implementation set.

    Values on a device are read on the first packed call of the model alone, so that later calls never wait for it.
    """
    if getattr(module, "layer_idx", 0) != 0:
        return
    forgotten = (
        "position_ids are missing: the model counted through whole rows, and positions must restart in each document. "
        "Pass position_ids=packed.position_ids with the batch, or call "
        "packflex.integrations.transformers.enable_packflex(model), which fills them in"
    )
    unexpanded = position_ids is not None and position_ids.dim() == 2 and position_ids.shape[0] == 1
    if unexpanded and packed.batch_size > 1:
        raise ValueError(f"{forgotten}. Got position_ids of shape {tuple(position_ids.shape)}")  # type: ignore[union-attr]
    if getattr(module, "_packflex_checked", False):
        return
    if unexpanded and packed.num_documents > 1:
        counted = torch.arange(packed.seq_len, device=packed.device)
        if torch.equal(cast(Tensor, position_ids)[0], counted):
            raise ValueError(
                f"{forgotten}. Got positions 0 to {packed.seq_len - 1} for {packed.num_documents} documents"
            )
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = ~attention_mask.diagonal(dim1=2, dim2=3).all(1) & (packed.document_ids >= 0)
        if bool(hidden.any()):
            b, token = hidden.nonzero()[0].tolist()
            raise ValueError(
                f"packed was given with an attention_mask that hides token {token} of row {b}, which belongs to a "
                "document. The layout already says which tokens are padding; drop attention_mask from the batch"
            )
        if attention_mask.numel() >= _WASTED_MASK_BYTES:
            warnings.warn(
                f"transformers built a mask of {attention_mask.numel() / 2**20:.0f} MiB that packflex does not read; "
                "call packflex.integrations.transformers.enable_packflex(model) once to leave it out",
                stacklevel=2,
            )
    module._packflex_checked = True  # type: ignore[assignment]


AttentionInterface.register(NAME, packflex_attention)
AttentionMaskInterface.register(NAME, packflex_mask)

"""`flex_attention`: what the arguments mean, what is refused, and which backend runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from packflex.attention import ops, reference
from packflex.attention.hopper import support
from packflex.attention.reference import ScoreMod
from packflex.integers import ceil_div
from packflex.masks.block_mask import BlockMask

BACKENDS = ("hopper", "triton", "torch", "reference")


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, int] | None = None,
    *,
    return_aux: Any = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    deterministic: bool | None = None,
    check_bounds: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention under a block mask, torch's `flex_attention` with documents first: `softmax(mod(QK^T * scale)) V`.

    Takes torch's arguments, so a switch is one import. Queries that see nothing (a padded tail) have output 0, lse
    -inf and gradient 0.

    Args:
        query: [B, Hq, S, D], any strides with a contiguous last axis. float16, bfloat16, float32 (and float64 in the
            reference backend). Under `torch.autocast` all three are cast to its dtype.
        key: [B, Hkv, KV_LEN, D].
        value: [B, Hkv, KV_LEN, Dv].
        score_mod: `score_mod(score, b, h, q_idx, kv_idx) -> score` on the scaled score.
        block_mask: a packflex or torch `BlockMask` for these lengths; None lets every query see every key.
        scale: factor on QK^T; 1 / sqrt(D) by default.
        enable_gqa: allow Hq to be a multiple of Hkv; query head h reads key head h // (Hq // Hkv). K and V are not
            repeated in memory.
        return_lse: also return the log-sum-exp of the scores.
        kernel_options: tiles to use instead of the tables: any of `packflex.attention.triton.tiles.OPTIONS`, such as
            `forward_block_m`, or with backend="hopper" of `packflex.attention.hopper.tiles.OPTIONS`.
        return_aux: torch's `AuxRequest`; `AuxRequest(lse=True)` returns `(out, AuxOutput)`. `max_scores`, the largest
            score of each query [B, Hq, S] (sinks aside, -inf where it sees nothing), costs a forward of its own, has no
            gradient, and is not to be had inside torch.compile.
        softcap: scores become `softcap * tanh(score / softcap)`, after `score_mod` (Gemma 2, arXiv 2408.00118).
        sinks: [Hq], a learned logit of each head that joins the softmax and carries no value (gpt-oss).
        deterministic: whether gradients must have the same bits in each run; None follows
            `torch.use_deterministic_algorithms`. All results have, except dQ of backend="hopper", whose sums over keys
            are made in any order: `True` runs the portable backward there. `True` refuses backend="torch" with a
            score_mod, whose gradients to captured tensors may differ.
        check_bounds: first evaluate every read of captured tensors in `score_mod` and the `mask_mod`, and raise for
            one past the end, which a kernel would read unnoticed; takes time with Q_LEN x KV_LEN, for debugging.
        backend: "hopper" (Gluon, sm_90), "triton", "torch" (its compiled flex_attention) or "reference" (eager, exact);
            the best for the device and case when None ("hopper" for masks of intervals, with a `score_mod` where that
            is a few operations and reads no table at both q_idx and kv_idx; "triton" for others; "reference" for
            float64, which no kernel takes, and on a CPU). A backend that is named is used or raises,
            never replaced; but gradients to captured tensors of a `score_mod` are the portable kernels' under "hopper"
            too.

    Returns:
        out [B, Hq, S, Dv] in query's dtype (autocast's under autocast), laid out so that `out.transpose(1, 2)` is
        contiguous. With `return_lse`, `(out, lse)`: lse float32 [B, Hq, S], natural logarithm, sink included,
        differentiable.

    Raises:
        ValueError: shapes, mask lengths or head counts that disagree; `return_lse` together with `return_aux`.
        TypeError: mixed or unsupported dtypes, a `block_mask` that is none.
        NotImplementedError: what the backend cannot do, with one that can.
        packflex.mods.errors.ModError: a ValueError; a mod that cannot become a kernel, with its line and the remedy.

    FlexAttention: arXiv 2412.05496. The online softmax: Dao, arXiv 2307.08691.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) if x.is_floating_point() else x for x in (query, key, value))
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux cannot both be given; ask for return_aux=AuxRequest(lse=True)")
    _check_tensors(query, key, value, sinks, enable_gqa)
    mask = _as_block_mask(block_mask, query, key)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for no cap; got {softcap}")
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    want_lse = return_lse or _wants_lse(return_aux)
    named = backend
    backend = _choose_backend(backend, query, key, value, mask, score_mod, scale, softcap, kernel_options)
    if kernel_options and backend not in ("triton", "hopper"):
        raise ValueError(f'kernel_options are tiles of the Triton kernels; the backend here is "{backend}"')
    if deterministic and backend == "torch" and score_mod is not None:
        raise NotImplementedError(
            "deterministic=True: torch's flex_attention adds gradients of captured tensors in no fixed order; use "
            'backend="triton"'
        )

    want_maxima = return_aux is not None and bool(getattr(return_aux, "max_scores", False))
    if want_maxima and (torch.compiler.is_compiling() or backend == "torch"):
        raise NotImplementedError(
            "return_aux: max_scores is computed outside torch.compile, and by packflex's own backends; ask for it "
            'outside the compiled part, with backend="triton" or None'
        )
    if not torch.compiler.is_compiling():
        _check_transforms((query, key, value), backend, _intervals_only(mask, score_mod))
    if check_bounds:
        _check_bounds(query, key, mask, score_mod, scale)
    cap = 0.0 if softcap is None else float(softcap)
    if backend == "torch":
        from packflex.attention.torch_flex import torch_flex_attention

        out, lse = torch_flex_attention(query, key, value, mask, score_mod, sinks, scale, cap, want_lse)
    elif backend in ("triton", "hopper") and not _intervals_only(mask, score_mod):
        from packflex.attention.mods.function import attention_with_mods

        out, lse = attention_with_mods(
            query, key, value, mask, None if _in_lists(mask) else _intervals(mask, query, key), score_mod, sinks, scale,
            cap, _tile_list(backend, kernel_options), _long(mask, key), _fixed(deterministic),
            "best" if backend == "hopper" and named is None else backend,
        )  # fmt: skip
    elif _intervals_only(mask, score_mod):
        kv_intervals, q_intervals = _intervals(mask, query, key)
        long = _long(mask, key)
        tiles = _tile_list(backend, kernel_options)
        out, lse = ops.attention(
            query, key, value, kv_intervals, q_intervals, sinks, scale, cap, backend, tiles, long, _fixed(deterministic)
        )
    else:
        mask_mod = None if mask is None else mask.element_mod
        out, lse = reference.dense_attention(query, key, value, mask_mod, score_mod, sinks, scale, cap)

    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        maxima = None
        if want_maxima:
            q, k, v = (x.detach() for x in (query, key, value))
            maxima = _max_scores(q, k, v, mask, score_mod, scale, cap, backend)
        return out, AuxOutput(lse=lse if return_aux.lse else None, max_scores=maxima)
    return (out, lse) if return_lse else out


def _tile_list(backend: str, kernel_options: dict[str, int] | None) -> list[int]:
    if backend == "triton":
        from packflex.attention.triton.tiles import tile_list

        return tile_list(kernel_options)
    if backend == "hopper":
        from packflex.attention.hopper.tiles import tile_list as hopper_tile_list

        return hopper_tile_list(kernel_options)
    return []


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, enable_gqa: bool) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, H, S, D]; got {tuple(x.shape)}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}")
        if x.dtype != query.dtype:
            dtypes = ", ".join(f"{n} {t.dtype}" for n, t in named.items())
            raise TypeError(f"query, key and value must have one dtype; got {dtypes}: cast them, or use torch.autocast")
        if x.device != query.device:
            raise ValueError(f"query is on {query.device} and {name} on {x.device}; move them to one device")
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(
            f"expected query [B, Hq, S, D], key [B, Hkv, KV_LEN, D], value [B, Hkv, KV_LEN, Dv]; got {shapes}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key heads; got {heads} and {kv_heads}")
    if heads != kv_heads and not enable_gqa:
        raise ValueError(
            f"{heads} query heads on {kv_heads} key heads is grouped-query attention: pass enable_gqa=True"
        )
    if sinks is not None:
        if sinks.shape != (heads,) or not sinks.is_floating_point():
            raise ValueError(
                f"sinks must be {heads} floats, one for each query head; got {sinks.dtype} {tuple(sinks.shape)}"
            )
        if sinks.device != query.device:
            raise ValueError(f"query is on {query.device} and sinks on {sinks.device}; move them to one device")


def _as_block_mask(block_mask: Any, query: Tensor, key: Tensor) -> BlockMask | None:
    if block_mask is None:
        return None
    if not isinstance(block_mask, BlockMask):
        from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

        if not isinstance(block_mask, TorchBlockMask):
            raise TypeError(
                f"block_mask must be a packflex or torch BlockMask (document_mask, create_block_mask); "
                f"got {type(block_mask).__name__}"
            )
        block_mask = BlockMask.from_torch(block_mask)
    wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    batch, heads, *lengths = block_mask.shape
    rows, needed = block_mask.listed_rows, ceil_div(lengths[0], block_mask.BLOCK_SIZE[0])
    if rows is not None and rows != needed:
        raise ValueError(
            f"block_mask lists {rows} tiles of queries where {lengths[0]} queries in tiles of "
            f"{block_mask.BLOCK_SIZE[0]} need {needed}: of a sliced mask set seq_lengths, as in "
            "mask.seq_lengths = (query.shape[2], key.shape[2])"
        )
    if tuple(lengths) != wanted[2:] or batch not in (1, wanted[0]) or heads not in (1, wanted[1]):
        raise ValueError(
            f"block_mask is for (B, H, Q_LEN, KV_LEN) = {block_mask.shape}, query and key are for {wanted}: "
            "build the mask from the layout of this batch"
        )
    if block_mask.device != query.device:
        raise ValueError(f"query is on {query.device} and block_mask on {block_mask.device}: move the layout first")
    return block_mask


def _wants_lse(return_aux: Any) -> bool:
    return return_aux is not None and bool(return_aux.lse)


@torch.no_grad()
def _max_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask | None,
    score_mod: ScoreMod | None,
    scale: float,
    softcap: float,
    backend: str,
) -> Tensor:
    """The largest score of each query; nothing learns through it."""
    if backend == "reference" and _intervals_only(mask, score_mod):
        return reference.reference_max_scores(query, key, _intervals(mask, query, key)[0], scale, softcap)
    if backend == "reference":
        mask_mod = None if mask is None else mask.element_mod
        return reference.dense_max_scores(query, key, mask_mod, score_mod, scale, softcap)
    from packflex.attention.mods.function import max_scores_with_mods

    intervals = None if _in_lists(mask) else _intervals(mask, query, key)
    return max_scores_with_mods(query, key, value, mask, intervals, score_mod, scale, softcap, _long(mask, key))


def _choose_backend(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask | None,
    score_mod: ScoreMod | None,
    scale: float,
    softcap: float | None,
    kernel_options: dict[str, int] | None,
) -> str:
    """The backend to run: the named one if it can, otherwise the best for the device and case."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None; got {backend!r}")
    unfit = None
    if _in_lists(mask):
        unfit = "it takes masks that are intervals (document_mask, or a mask_mod that create_block_mask recognises)"
    elif score_mod is not None and softcap is not None:
        unfit = "it takes no score_mod together with a softcap"
    if backend == "hopper" and (why := unfit or support.refusal(query, key, value, scale)):
        raise NotImplementedError(f'backend="hopper" cannot run this: {why}; use backend="triton" or "reference"')
    if backend is not None:
        return backend
    if query.device.type != "cuda" or query.dtype == torch.float64:
        return "reference"
    # kernel_options without a backend have always meant the portable kernels' tiles
    if unfit or kernel_options or support.refusal(query, key, value, scale):
        return "triton"
    return "hopper"


def _check_transforms(tensors: tuple[Tensor, ...], backend: str, intervals: bool) -> None:
    """Refuse what torch.func's transforms cannot do with an op whose derivative is an op."""
    functorch = torch._C._functorch
    if backend == "torch" or (backend == "reference" and not intervals):
        return
    if any(map(functorch.is_gradtrackingtensor, tensors)):
        raise NotImplementedError(
            "torch.func's derivatives (grad, vjp, jacrev, ...) do not go through packflex's kernels: write "
            'torch.autograd.grad or .backward(); with a score_mod or an evaluated mask, backend="reference" takes them'
        )
    if not intervals and any(map(functorch.is_batchedtensor, tensors)):
        raise NotImplementedError(
            "torch.vmap does not go through packflex's kernels with mods: make the mapped axis part of the batch axis, "
            'or ask for backend="reference"'
        )


def _check_bounds(query: Tensor, key: Tensor, mask: BlockMask | None, score_mod: ScoreMod | None, scale: float) -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError("check_bounds=True waits for values; use it outside torch.compile")
    from packflex.mods.bounds import check_reads

    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask is not None and _in_lists(mask):
        check_reads(mask.mask_mod, "mask", shape, query.device)
    if score_mod is None:
        return
    group = query.shape[1] // key.shape[1]

    def scores(b: int, h: int, rows: slice) -> Tensor:
        return query[b, h, rows].detach().float() @ key[b, h // group].detach().float().T * scale

    check_reads(score_mod, "score", shape, query.device, None if mask is None else mask.element_mod, scores)


def _in_lists(mask: BlockMask | None) -> bool:
    return mask is not None and mask.kv_intervals is None


def _intervals_only(mask: BlockMask | None, score_mod: ScoreMod | None) -> bool:
    return score_mod is None and not _in_lists(mask)


def _long(mask: BlockMask | None, key: Tensor) -> bool:
    return key.shape[2] >= 1024 if mask is None else mask.long_spans


def _fixed(deterministic: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def _intervals(mask: BlockMask | None, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        ends = torch.tensor([[0, 0], [kv_len, q_len]], dtype=torch.int32, device=query.device)
        return ends[:, 0, None, None].expand(2, batch, q_len), ends[:, 1, None, None].expand(2, batch, kv_len)
    assert mask.kv_intervals is not None
    assert mask.q_intervals is not None
    return mask.kv_intervals.expand(2, batch, q_len), mask.q_intervals.expand(2, batch, kv_len)

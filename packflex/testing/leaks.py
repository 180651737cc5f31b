"""Do documents of a packed batch leak into one another? Perturb one, and watch the logits of the others.

A leak shows in no loss curve: the model trains, on the wrong thing. Whether documents stay apart depends on the model,
its attention implementation, its cache setting and its position ids together, so it is measured, on the model itself,
with a probe of a few hundred tokens before training starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from packflex.layout import PackedLayout
from packflex.testing._leak_report import Leak, LeakError, LeakReport

__all__ = ["PROBE_LENGTHS", "PROBE_SEQ_LEN", "Leak", "LeakError", "LeakReport", "check_leaks", "find_leaks"]

# Two rows of other documents with padded tails; the third document crosses token 128, where kernels cut their tiles.
PROBE_LENGTHS = ((60, 37, 50), (75, 20))
PROBE_SEQ_LEN = 160

# A leak through attention moves logits about as far as the tokens of a document move one another ("reach"): 0.6 to 1.1
# times in small Llama and gpt-oss models at their initial weights. One leaking layer of many moves them less. Without a
# leak they do not move at all, except by rounding where tokens are regrouped (mixtures of experts).
_REACH_SHARE = 1e-3
_ROUNDINGS = 4
# Alone, a document starts at another place in the kernel's tiles, and sums are taken in another order.
_ALONE_REACH_SHARE = 1e-2
_ALONE_ROUNDINGS = 16

Forward = Callable[[dict[str, Any]], Any]


def find_leaks(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    forward: Forward | None = None,
    lengths: Sequence[Sequence[int]] = PROBE_LENGTHS,
    seq_len: int = PROBE_SEQ_LEN,
) -> LeakReport:
    """Look for leaks between documents with a small probe, and compare the batch's position ids with its layout.

    The probe is a packed batch of its own (5 documents in 2 rows of 160 tokens, with padded tails) made of tokens of
    `batch`, which keeps the cost at 11 forward passes of 320 tokens. Each document is perturbed in turn, then the
    padding, then each document is run alone in a row. The model runs in eval mode without gradients; its training
    modes and the random state are put back. The number of passes is fixed, so that all ranks can do it together.

    Args:
        model: the model, for its mode, device and dtype.
        batch: a packed batch: input_ids int64 [B, S], packed, and position_ids and labels if the model gets them. Only
            its tokens are used in the probe, and the keys that it has are those that the probe has.
        forward: `forward(batch) -> logits`; `model(**batch)` by default. It may return a tensor [B, S, vocabulary],
            an object with `.logits`, a mapping with "logits" or a tuple that starts with them.
        lengths: documents of the probe, one list for each row; at least two documents in one row.
        seq_len: tokens of a row of the probe.

    Returns:
        The report. `report.leaks` is empty for a sound model.

    Raises:
        ValueError: a batch without what a probe needs, or logits that are not finite or of another shape.

    Example:
        >>> report = find_leaks(model, batch)
        >>> report.leaks
        (Leak(kind='document', source=0, moved=(1, 2), change=0.082), ...)
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    layout = PackedLayout.from_lengths(lengths, seq_len).to(device)
    if max(map(len, layout.lengths)) < 2:
        raise ValueError(f"a probe needs two documents in one row to look for leaks; got lengths {layout.lengths}")
    probe = _Probe(model, batch, forward, device)
    document_ids = layout.document_ids.long()
    real = document_ids >= 0
    second_half = layout.position_ids >= _length_of_token(layout, document_ids) // 2

    leaks = _position_leaks(batch)
    with _at_rest(model, device):
        ids = probe.tokens(layout, offset=0)
        other = probe.tokens(layout, offset=1)
        base = probe.logits(ids, layout)
        scale = base[real].abs().max().item()
        halves = probe.logits(torch.where(real & ~second_half, other, ids), layout)
        reach = (halves - base).abs()[real & second_half].max().item()
        eps = probe.eps
        tolerance = max(_REACH_SHARE * reach, _ROUNDINGS * eps * scale)
        alone_tolerance = max(_ALONE_REACH_SHARE * reach, _ALONE_ROUNDINGS * eps * scale)

        for source in range(layout.num_documents):
            changed = probe.logits(torch.where(document_ids == source, other, ids), layout)
            change = _change_by_document(changed - base, document_ids, layout.num_documents)
            leaks += _leak("document", source, change, tolerance, leave_out=source)
        changed = probe.logits(torch.where(real, ids, other), layout)
        change = _change_by_document(changed - base, document_ids, layout.num_documents)
        leaks += _leak("padding", None, change, tolerance)
        alone = probe.alone(ids, other, layout)
        change = _change_by_document(alone - base, document_ids, layout.num_documents, typical=True)
        leaks += _leak("alone", None, change, alone_tolerance)
    return LeakReport(tuple(leaks), layout, reach, tolerance, alone_tolerance, _attention_names(model))


def check_leaks(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    forward: Forward | None = None,
    lengths: Sequence[Sequence[int]] = PROBE_LENGTHS,
    seq_len: int = PROBE_SEQ_LEN,
) -> LeakReport:
    """Stop with the finding when documents leak; arguments and result as `find_leaks`.

    Warns when the model could not have shown a leak: where attention has no effect on the logits yet (an output layer
    or attention projections that start at zero), nothing moves, sound or not.

    Raises:
        LeakError: which document leaks into which, how much, the likely cause and the remedy, in one paragraph.
    """
    report = find_leaks(model, batch, forward=forward, lengths=lengths, seq_len=seq_len)
    if report.leaks:
        raise LeakError(report)
    if not report.sensitive:
        warnings.warn(
            f"the leak check saw nothing and could not have: tokens of a document move one another's logits by "
            f"{report.reach:.1e} only, below what rounding explains ({report.tolerance:.1e}). Layers that start at "
            "zero do that; check again after some steps, or pass forward= that returns hidden states",
            stacklevel=2,
        )
    return report


class _Probe:
    """Runs packed batches of the probe's shape through the model."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], forward: Forward | None, device: torch.device):
        packed, input_ids = batch.get("packed"), batch.get("input_ids")
        if not isinstance(packed, PackedLayout) or not isinstance(input_ids, Tensor):
            raise ValueError(
                "a leak check needs a packed batch: input_ids [B, S] and packed=PackedLayout; "
                f"got {', '.join(f'{key}: {type(value).__name__}' for key, value in batch.items()) or 'nothing'}"
            )
        in_documents = packed.document_ids.to(input_ids.device) >= 0
        self.pool = input_ids[in_documents].unique().to(device)
        if len(self.pool) < 2:
            raise ValueError(
                f"a leak check needs two different tokens to perturb documents; the batch holds {self.pool.tolist()}"
            )
        self.keys = [key for key in ("labels", "position_ids") if batch.get(key) is not None]
        self.device = device
        self.forward: Forward = (lambda b: model(**b)) if forward is None else forward
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if torch.is_autocast_enabled(device.type):
            dtypes.add(torch.get_autocast_dtype(device.type))
        self.eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)

    def tokens(self, layout: PackedLayout, offset: int) -> Tensor:
        """Token ids [B, S], the same for every call; those of another offset differ everywhere."""
        generator = torch.Generator().manual_seed(0)
        at = torch.randint(len(self.pool), (layout.batch_size, layout.seq_len), generator=generator)
        return self.pool[((at + offset) % len(self.pool)).to(self.device)]

    def logits(self, ids: Tensor, layout: PackedLayout) -> Tensor:
        """Logits [B, S, V] in fp32."""
        batch: dict[str, Any] = {"input_ids": ids, "packed": layout}
        if "labels" in self.keys:
            batch["labels"] = torch.where(layout.position_ids > 0, ids, -100)
        if "position_ids" in self.keys:
            batch["position_ids"] = layout.position_ids
        result = self.forward(batch)
        if isinstance(result, Mapping):
            result = result["logits"]
        elif isinstance(result, tuple):
            result = result[0]
        result = getattr(result, "logits", result)
        if not isinstance(result, Tensor) or result.shape[:2] != ids.shape or result.dim() != 3:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"forward must return logits [{ids.shape[0]}, {ids.shape[1]}, vocabulary] for the probe; got {got}"
            )
        self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        if not result[layout.document_ids >= 0].isfinite().all():
            raise ValueError("the model's logits are not finite on a packed probe; see that its weights are loaded")
        return result.float()

    def alone(self, ids: Tensor, filler: Tensor, layout: PackedLayout) -> Tensor:
        """Logits [B, S, V] put together from runs in which a row starts with one document and holds no other."""
        places = [
            (b, slice(end - length, end))
            for b, row in enumerate(layout.lengths)
            for end, length in zip(torch.tensor(row).cumsum(0).tolist(), row, strict=True)
        ]
        together: Tensor | None = None
        for first in range(0, len(places), layout.batch_size):
            some = places[first : first + layout.batch_size]
            some += some[:1] * (layout.batch_size - len(some))  # one shape for all runs: nothing is compiled twice
            rows = filler.clone()
            for row, (b, tokens) in zip(rows, some, strict=True):
                row[: tokens.stop - tokens.start] = ids[b, tokens]
            lengths = [[tokens.stop - tokens.start] for _, tokens in some]
            logits = self.logits(rows, PackedLayout.from_lengths(lengths, layout.seq_len).to(self.device))
            together = torch.zeros_like(logits) if together is None else together
            for row, (b, tokens) in zip(logits, some, strict=True):
                together[b, tokens] = row[: tokens.stop - tokens.start]
        assert together is not None
        return together


@contextmanager
def _at_rest(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, and everything as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _length_of_token(layout: PackedLayout, document_ids: Tensor) -> Tensor:
    lengths = layout.cu_seqlens.diff()
    return lengths[document_ids.clamp(min=0)].long()


def _change_by_document(difference: Tensor, document_ids: Tensor, count: int, typical: bool = False) -> list[float]:
    """Largest change of a logit in each document, or that of its median token.

    A leak may reach the first tokens of a document alone (a convolution), so all of them count. Wrong positions move
    every token, while rounding may send one token of many to another expert.
    """
    by_token = difference.abs().amax(-1)
    return [(x.median() if typical else x.max()).item() for x in (by_token[document_ids == d] for d in range(count))]


def _leak(
    kind: Literal["document", "padding", "alone"],
    source: int | None,
    change: list[float],
    tolerance: float,
    leave_out: int | None = None,
) -> tuple[Leak, ...]:
    moved = tuple(d for d, x in enumerate(change) if d != leave_out and x > tolerance)
    return (Leak(kind, source, moved, max(change[d] for d in moved)),) if moved else ()


def _position_leaks(batch: Mapping[str, Any]) -> tuple[Leak, ...]:
    positions, packed = batch.get("position_ids"), batch.get("packed")
    if not isinstance(positions, Tensor) or not isinstance(packed, PackedLayout):
        return ()
    expected = packed.position_ids.to(positions.device)
    document_ids = packed.document_ids.to(positions.device)
    difference = (positions - expected).abs() * (document_ids >= 0)
    moved = document_ids[difference > 0].unique().tolist()
    return (Leak("positions", None, tuple(moved), float(difference.max())),) if moved else ()


def _attention_names(model: nn.Module) -> tuple[str, ...]:
    configs = (getattr(module, "config", None) for module in model.modules())
    names = (getattr(config, "_attn_implementation", None) for config in configs)
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))

"""What a leak check found, and how it is told: which document leaked into which, how much, why, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from packflex.layout import PackedLayout


class LeakError(RuntimeError):
    """Documents of a packed batch are not kept apart; `report` holds the finding."""

    def __init__(self, report: LeakReport) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Leak:
    """One finding.

    Attributes:
        kind: "document": other documents moved when one was perturbed. "padding": documents moved when the padded
            tails were. "alone": documents differ from themselves run alone. "positions": the batch's position_ids are
            not its layout's.
        source: the document that was perturbed, for kind "document".
        moved: the documents whose logits moved or differ; numbers over all rows of `LeakReport.layout`.
        change: the largest change of a logit (for "alone", of the median token of a document); for "positions", the
            largest difference of a position.
    """

    kind: Literal["document", "padding", "alone", "positions"]
    source: int | None
    moved: tuple[int, ...]
    change: float


@dataclass(frozen=True)
class LeakReport:
    """What `find_leaks` found; `str(report)` is one readable paragraph.

    Attributes:
        leaks: the findings, none for a sound model.
        layout: layout of the probe, whose documents the findings number.
        reach: how far perturbing the first half of the documents moved the logits of their second halves. The measure
            of what attention does in this model.
        tolerance: changes up to here are rounding when something is perturbed.
        alone_tolerance: the same between packed and alone.
        attention: attention implementations that the model's configurations name, for the likely cause.
    """

    leaks: tuple[Leak, ...]
    layout: PackedLayout
    reach: float
    tolerance: float
    alone_tolerance: float
    attention: tuple[str, ...] = ()

    @property
    def sensitive(self) -> bool:
        """Whether a leak could have been seen: attention moves logits further than the tolerance."""
        return self.reach > 2 * self.tolerance

    def __str__(self) -> str:
        if not self.leaks:
            return (
                f"No leak: with one of {self.layout.num_documents} documents perturbed, the others moved by no more "
                f"than {self.tolerance:.1e} (tokens of a document move one another by {self.reach:.1e})."
            )
        sentences = []
        documents = [leak for leak in self.leaks if leak.kind == "document"]
        if documents:
            pairs = "; ".join(f"{leak.source} into {_listed(leak.moved)}" for leak in documents)
            largest = max(leak.change for leak in documents)
            sentences.append(
                f"Documents leak: {pairs}. Other tokens in one document moved the logits of the others by up to "
                f"{largest:.2g} (tokens of a document move one another by {self.reach:.2g}, tolerance "
                f"{self.tolerance:.1e}; rows hold documents {_rows(self.layout)})"
            )
        for leak in self.leaks:
            if leak.kind == "padding":
                sentences.append(
                    f"Padding leaks into documents {_listed(leak.moved)}: other tokens in the padded tails moved their "
                    f"logits by up to {leak.change:.2g} (tolerance {self.tolerance:.1e})"
                )
            elif leak.kind == "alone":
                sentences.append(
                    f"Documents {_listed(leak.moved)} differ from themselves run alone, by up to {leak.change:.2g} at "
                    f"their median token (tolerance {self.alone_tolerance:.1e})"
                )
            elif leak.kind == "positions":
                sentences.append(
                    f"The batch's position_ids are not its layout's: documents {_listed(leak.moved)} of the batch "
                    f"differ, by up to {leak.change:.0f}"
                )
        return ". ".join([*sentences, self._cause()])

    def _cause(self) -> str:
        rows = _row_of_document(self.layout)
        crossing = [(leak.source, d) for leak in self.leaks if leak.kind == "document" for d in leak.moved]
        named = " and ".join(map(repr, self.attention))
        if any(rows[s] != rows[d] for s, d in crossing if s is not None):
            return (
                "Likely cause: something mixes the rows of a batch (a batch norm, a batch that is flattened before "
                "attention). No attention mask mends that; take it out of the model."
            )
        if crossing and any(d < s for s, d in crossing if s is not None):
            return (
                "Likely cause: bidirectional attention that does not get the layout. Pass packed= to the model and on "
                "to its attention layers, and give packflex.flex_attention document_mask(packed, causal=False)."
            )
        kinds = {leak.kind for leak in self.leaks}
        if crossing:
            uses = f" (its configuration says attn_implementation={named})" if named and named != "'packflex'" else ""
            cause = f"the attention layers do not use the layout{uses}"
            if "alone" not in kinds:
                cause = (
                    "the first tokens of documents are reached alone, so it is a convolution or token shift along the "
                    f"row, which no attention mask mends, or {cause} and have a short window"
                )
            return (
                f"Likely cause: {cause}. Call packflex.integrations.transformers.enable_packflex(model) and pass "
                "packed= to the model; in your own layers give packflex.flex_attention "
                "block_mask=document_mask(packed)."
            )
        if "padding" in kinds:
            return (
                "Likely cause: attention that sees keys after the last document of a row. Mask the padded tail; "
                "document_mask(packed) leaves it out."
            )
        return (
            "Likely cause: positions that do not restart at 0 in each document. Pass "
            "position_ids=packed.position_ids, and see that the model uses them."
        )


def _row_of_document(layout: PackedLayout) -> list[int]:
    return [b for b, row in enumerate(layout.lengths) for _ in row]


def _rows(layout: PackedLayout) -> str:
    offsets = layout.row_offsets.tolist()
    return " and ".join(f"{a} to {b - 1}" for a, b in pairwise(offsets) if b > a)


def _listed(numbers: Sequence[int], shown: int = 8) -> str:
    text = ", ".join(map(str, numbers[:shown]))
    return text if len(numbers) <= shown else f"{text}, ... {len(numbers) - shown} more"

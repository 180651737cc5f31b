"""transformers' `Trainer` and TRL's `SFTTrainer` on packflex: one line after the trainer is made.

::

    trainer = SFTTrainer(model, args=SFTConfig(packing=True, ...), train_dataset=documents)
    packflex.integrations.trl.use_packflex(trainer)
    trainer.train()

The trainers keep their own packing (`SFTConfig(packing=True)`), padding-free batches (`padding_free=True`, or
`DataCollatorWithFlattening`) and padded ones. The layout is made where the batch is collated, on the host, from what
they hand over: `position_ids` that restart in every document, or an `attention_mask` with padding on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from packflex.integrations.transformers import enable_packflex
from packflex.layout import PackedLayout

# What collators add for varlen kernels; the layout says the same.
_VARLEN_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def use_packflex(trainer: Trainer, backend: str | None = None) -> None:
    """Make a trainer's model attend through packflex, and its collator say which documents a batch holds.

    Call it once after the trainer is made and before `train()`. Training and evaluation batches alike get a `packed`
    layout; losses stay the trainer's own.

    Args:
        trainer: a transformers `Trainer`, or TRL's `SFTTrainer`.
        backend: of `packflex.flex_attention`, the best for the device when None.

    Raises:
        ValueError: TRL's "wrapped" packing, and packed evaluation without packed or padding-free training, whose
            batches no longer tell where documents begin; or a backend that does not exist.
        NotImplementedError: a model that mixes documents outside attention.
    """
    args = trainer.args
    packing, packs_eval = getattr(args, "packing", False), getattr(args, "eval_packing", None)
    packs_eval = packing if packs_eval is None else packs_eval
    if (packing or packs_eval) and getattr(args, "packing_strategy", None) == "wrapped":
        raise ValueError(
            'packing_strategy="wrapped" forgets where documents begin, so they would see each other; use '
            'packing_strategy="bfd"'
        )
    if packs_eval and not packing and not getattr(args, "padding_free", False):
        raise ValueError(
            "eval_packing=True with packing=False: TRL then collates packed rows as if each were one document, and "
            "documents would see each other; set padding_free=True, packing=True, or eval_packing=False"
        )
    enable_packflex(trainer.model, backend)  # type: ignore[arg-type]
    if not isinstance(trainer.data_collator, LayoutCollator):
        trainer.data_collator = LayoutCollator(trainer.data_collator)


class LayoutCollator:
    """A collator around another one that adds `packed`, the batch's `PackedLayout`.

    An `attention_mask` stays in the batch, for trainers count tokens by it; `packed_from_mask=True` then tells the
    model that the layout says all that the mask does.

    Args:
        collator: gives `input_ids` int64 [B, S] and either `position_ids` int64 [B, S], which start at 0 in every
            document, or `attention_mask` int64 [B, S] with 0 for padding on the right of the one document of a row.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """The other collator's batch without varlen arguments, with `packed`.

        Raises:
            ValueError: a batch with neither `position_ids` nor `attention_mask`, packed rows without `position_ids`, or
                padding on the left.
        """
        batch = dict(self.collator(examples))
        positions, mask = batch.get("position_ids"), batch.get("attention_mask")
        for key in _VARLEN_KEYS:
            batch.pop(key, None)
        if positions is None and mask is None:
            raise ValueError(
                f"{type(self.collator).__name__} gave neither position_ids nor attention_mask (only "
                f"{', '.join(batch)}), so documents cannot be told apart; for TRL set packing=True or padding_free=True"
            )
        packed = next((i for i, example in enumerate(examples) if len(_seq_lengths(example)) > 1), None)
        if positions is None and packed is not None:
            raise ValueError(
                f"example {packed} of the batch is packed (seq_lengths {_seq_lengths(examples[packed])}), and "
                f"{type(self.collator).__name__} gave no position_ids, so its documents would see each other; set "
                "padding_free=True"
            )
        real = None if mask is None else _lengths(mask)
        if positions is None:
            assert mask is not None
            assert real is not None
            batch["packed"] = PackedLayout.from_lengths([[n] if n else [] for n in real], mask.shape[1])
            batch["position_ids"] = batch["packed"].position_ids
        else:
            batch["packed"] = PackedLayout.from_position_ids(positions, real)
        if mask is not None:
            batch["packed_from_mask"] = True
        return batch


def _seq_lengths(example: Any) -> list[int]:
    """What TRL's packing notes of a row: the lengths of its documents; empty for other rows."""
    found = example.get("seq_lengths") if isinstance(example, Mapping) else None
    return [] if found is None else list(found)


def _lengths(mask: Tensor) -> list[int]:
    """Tokens of each row before its padding."""
    lengths = mask.bool().sum(1)
    expected = torch.arange(mask.shape[1]) < lengths[:, None]
    wrong = (mask.bool() != expected).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"row {wrong[0]} of the batch is padded on the left or has gaps in its attention_mask; train with "
            'tokenizer.padding_side = "right"'
        )
    return lengths.tolist()

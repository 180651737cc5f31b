"""Resuming in the middle of an epoch: what Lightning's checkpoints and loops need so that no row is lost or repeated.

Three things of Lightning's stand in the way, and each is mended through its public hooks:

- it reads `len(loader)` before it gives the loader its state, so the length is that of an epoch from its first row;
- it reads the length once, and on another number of ranks the resumed epoch is not as long as those after it;
- it counts an epoch that `max_steps` cut short as whole, and gives no state to the loader of a run between two epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from packflex.data.loader import PackedLoader


def loader_states(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """States of the training loaders in a checkpoint of Lightning's; none when it holds none."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    return [state for state in fit_loop.get("state_dict", {}).get("combined_loader", []) if state]


def resume_loader(loader: Any, ckpt_path: str | Path) -> None:
    """Give a loader its place before `trainer.fit(module, loader, ckpt_path=...)`, so that its length is right.

    Needed for a `PackedLoader` of one's own on another number of ranks, or with another batch size, than the checkpoint
    was written with. `PackedDataModule` does it by itself.

    Args:
        loader: that the trainer will get.
        ckpt_path: the checkpoint's file.

    Raises:
        ValueError: a checkpoint without the state of one training loader.
    """
    states = loader_states(torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True))
    if len(states) != 1:
        raise ValueError(
            f"{ckpt_path}: holds the states of {len(states)} training loaders and not of one; give the checkpoint of a "
            "run that trained from a PackedLoader"
        )
    loader.load_state_dict(states[0])


def reopen_epoch(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Take back, in a checkpoint, that an epoch is over which `max_steps` or a stop ended in its middle.

    It is then as one that was saved when its last batch ended: a run that goes on from it begins with the rest of that
    epoch, and not with a next one, and counts the steps that it logs from there.

    Args:
        checkpoint: of Lightning's, changed in place.
        accumulate: batches of an optimizer step.
    """
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    is_cut = any(state.get("started") and state.get("consumed", 0) < state.get("num_rows", 0)
                 for state in loader_states(checkpoint))  # fmt: skip
    progress, batches = fit_loop.get("epoch_progress"), fit_loop.get("epoch_loop.batch_progress")
    if not is_cut or not progress or not batches or batches.get("is_last_batch"):
        return
    if progress["current"]["processed"] != progress["current"]["ready"]:
        return
    for part in (progress["total"], progress["current"]):
        part["processed"] -= 1
        part["completed"] = min(part["completed"], part["processed"])
    for part in (batches["total"], batches["current"]):
        part["completed"] = part["processed"] - 1
    if batches["current"]["ready"] % accumulate == 0:
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning adds it when it begins


def steps_to_come(
    rows: int, rows_per_step: int, accumulate: int, epochs: float, state: Mapping[str, Any] | None
) -> float:
    """Optimizer steps that a run of so many epochs has before it.

    Args:
        rows: of an epoch.
        rows_per_step: rows that one batch takes over all ranks.
        accumulate: batches of an optimizer step.
        epochs: of the run, what is done included.
        state: of the loader that goes on; None from the start.

    Example: 40 rows, 10 of them seen by one rank; on two ranks 15 steps are left of the epoch, and 20 make the next.
        >>> state = {"epoch": 0, "consumed": 10, "delivered": 10, "started": True}
        >>> steps_to_come(40, 2, 1, 2, state)
        35
    """
    of_epoch = math.ceil(math.ceil(rows / rows_per_step) / accumulate)
    if state is None or not state["started"]:
        return of_epoch * epochs
    rest = 0
    if state["consumed"] < rows:
        batches = state["delivered"] + math.ceil((rows - state["consumed"]) / rows_per_step)
        rest = math.ceil(batches / accumulate) - state["delivered"] // accumulate
    return rest + of_epoch * max(0, epochs - state["epoch"] - 1)


class LengthReader:
    """Has Lightning ask for the training loader, and with it for its length, once more before the next epoch."""

    def __init__(self) -> None:
        self._trainer: Any = None  # its connector sets what is changed here

    def ask(self, trainer: Any, loader: Any) -> None:
        """Ask for it, where the epoch that is resumed has another length than the next and nobody asked before."""
        if isinstance(loader, PackedLoader) and loader.length_changes and not trainer.reload_dataloaders_every_n_epochs:
            self._trainer = trainer
            trainer.reload_dataloaders_every_n_epochs = 1

    def done(self) -> bool:
        """Leave the trainer as it was; whether it had been asked."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.reload_dataloaders_every_n_epochs = 0
        return trainer is not None

"""`KeepRandomState`: checkpoints hold every rank's random state, so that a resumed run draws the same dropout."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn

from packflex.integrations.lightning.ranks import gathered

_KEY = "KeepRandomState"


class KeepRandomState(L.Callback):
    """Resume with the random numbers that would have come: bitwise on CPU with dropout (LoRA's, the model's) too.

    Each rank's states of torch (CPU and its own GPU), numpy and Python go into every checkpoint, and are put back where
    the first training batch begins, whatever validation or loading drew before. On another number of ranks, rank r
    takes the state of rank r modulo those saved: a valid run, with other random numbers than the unbroken one. A
    checkpoint without states leaves the run's as they are.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what an earlier run did not use."""
        self._states = []

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states, by rank; every rank takes part."""
        checkpoint[_KEY] = gathered(random_state(trainer.strategy.root_device), trainer.world_size)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep them for the first training batch; a validation of the checkpoint does without."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._states = checkpoint.get(_KEY, [])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first batch of a resumed run, put the state back."""
        states, self._states = self._states, []
        if states:
            set_random_state(states[trainer.global_rank % len(states)], trainer.strategy.root_device)


def random_state(device: torch.device) -> dict[str, Any]:
    """States of torch, numpy and Python in this process, of types that `torch.load` reads without trusting the file.

    Args:
        device: whose state is included when it is a GPU.
    """
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": (name, np.asarray(keys).tolist(), *rest)}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state | {"python": random.getstate()}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned; a GPU's only where there was one and there is one."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

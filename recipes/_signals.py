"""Signals outside training steps, where `SaveOnSignal` does not hold them: a run ends with a line and its exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import lightning as L
from _data import say
from lightning.pytorch.trainer.states import TrainerFn

from packflex.integrations.lightning.signals import SIGNALS, SaveOnSignal, in_worker
from packflex.report import shortest


class StoppedError(BaseException):
    """A signal that ends the run; no `Exception`, so that nobody on the way takes it for a failure."""


class StopSignals(L.Callback):
    """While it is open, SIGINT, SIGTERM and SIGUSR2 end the run and say how to go on: `with StopSignals() as signals:`.

    Lightning by itself ends a validation with exit code 0 and without a word, as if the run were done. The trainer
    needs this among its callbacks, before `SaveOnSignal`.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._waiting: signal.Signals | None = None  # came while held
        self._is_held = False
        self._advice: Callable[[], str] = lambda: "before the first step, so there is nothing to save"
        self._launcher: Any = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self._take()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if not isinstance(error, StoppedError):
            return
        number = error.args[0]
        if self._launcher is not None:
            self._launcher.kill(number)  # ranks that wait for this one
        say("\nStopped by %s %s", number.name, self._advice())
        sys.exit(128 + number)

    def trained(self, checkpoint: Path) -> None:
        """Say that training is over and saved; a signal that came meanwhile ends the run now."""
        advice = f"after training. The same command and ckpt_path={shortest(checkpoint)} saves the model"
        self._advice = lambda: advice
        self._is_held = False
        if self._waiting is not None:
            raise StoppedError(self._waiting)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Know who started the other ranks, and which process is this one."""
        self._launcher = trainer.strategy.launcher
        self._process = os.getpid()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set Lightning's handling aside, but for a validation between training steps."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._take()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set Lightning's handling aside; training steps are `SaveOnSignal`'s, if there is one."""
        self._take()
        self._advice = partial(_during_training, trainer, trainer.ckpt_path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold signals until the end of training is saved."""
        self._is_held = True

    def _take(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked
            in_worker(number)
        elif self._is_held:
            self._waiting = signal.Signals(number)
        else:
            raise StoppedError(signal.Signals(number))


def _during_training(trainer: L.Trainer, resumed: str | Path | None) -> str:
    """What a run can be gone on from that ends in the middle of a step: the last checkpoint that it wrote or read."""
    paths = [path for c in trainer.checkpoint_callbacks for path in (c.last_model_path, c.best_model_path)]
    paths += [c.checkpoint for c in trainer.callbacks if isinstance(c, SaveOnSignal)]
    saved = [Path(path) for path in paths if path and Path(path).exists()]
    last = max(saved, key=lambda path: path.stat().st_mtime, default=resumed)
    if last is None:
        return "during training, before a checkpoint was saved, so there is nothing to go on from"
    return f"during training. Go on from its last checkpoint with the same command and ckpt_path={shortest(Path(last))}"

"""`SaveOnSignal`: Ctrl-C, `kill` and a scheduler's time limit end a run with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch

# SIGUSR2 is what submitit has SLURM send some minutes before a job's time is over.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_STDERR = 2  # written to by number: a handler may come in the middle of a print


class SaveOnSignal(L.Callback):
    """On SIGINT, SIGTERM or SIGUSR2, finish the optimizer step, save a checkpoint, and stop training.

    During the last step of `max_steps` or `max_epochs` there is nothing left to go on with: training ends as it
    would have. After the checkpoint no validation follows, which Lightning would run as it stops, unless somebody
    waits for it: a schedule by a metric, or a callback with a `monitor` (`EarlyStopping`, `ModelCheckpoint`), which
    would find no metric or an old one. The first signal is answered by a line on stderr. A second Ctrl-C stops at
    once, without a checkpoint: it goes to whoever had SIGINT before, which for Python itself is a
    `KeyboardInterrupt`. Over several ranks a signal to any of them stops all at the same step, on GPUs one step later.
    Lightning's own handling of them is set aside while training runs.

    Args:
        dirpath: folder of `interrupted.ckpt`; the trainer's `default_root_dir` when None.

    Attributes:
        caught: the signal that came, None when none did.
        checkpoint: the checkpoint that was saved for it: `trainer.fit(..., ckpt_path=callback.checkpoint)` goes on
            with the batch that would have come next. None when no signal came, or in the last step.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.dirpath = dirpath
        self.caught: signal.Signals | None = None
        self.checkpoint: Path | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._process = os.getpid()
        self._speaks = True
        self._step = 0
        self._asked: torch.Tensor | None = None  # signals on all ranks, as of the step before
        self._limit_val_batches: int | float | None = None  # the trainer's, while it is set aside

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals."""
        self.caught, self.checkpoint, self._asked = None, None, None
        self._step = trainer.global_step
        self._process, self._speaks = os.getpid(), trainer.is_global_zero
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two optimizer steps: save and stop if a signal came."""
        if trainer.global_step == self._step or self.checkpoint is not None:
            return  # in the middle of accumulation, gradients would be lost
        self._step = trainer.global_step
        if _is_over(trainer) or not self._anyone(trainer):
            return
        folder = Path(trainer.default_root_dir if self.dirpath is None else self.dirpath)
        trainer.save_checkpoint(folder / "interrupted.ckpt")
        self.checkpoint = folder / "interrupted.ckpt"
        trainer.should_stop = True
        if not _awaits_validation(trainer):
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals and the validation back."""
        self._release(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals and the validation back."""
        self._release(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            in_worker(number)
        elif self.caught is None:
            self.caught = signal.Signals(number)
            if self._speaks:
                again = "again " if number == signal.SIGINT else ""
                os.write(_STDERR, f"\nFinishing the step, then saving; Ctrl-C {again}stops at once\n".encode())
        elif number == signal.SIGINT:
            before = self._handlers.get(signal.SIGINT)
            if callable(before):
                before(number, frame)
            raise KeyboardInterrupt

    def _anyone(self, trainer: L.Trainer) -> bool:
        if trainer.world_size == 1:
            return self.caught is not None
        here = torch.tensor(float(self.caught is not None), device=trainer.strategy.root_device)
        now = trainer.strategy.reduce(here, reduce_op="sum")
        # on a GPU the answer to the question before, so that the host need not wait for the device
        before, self._asked = (now, None) if here.device.type == "cpu" else (self._asked, now)
        anyone = before is not None and bool(before > 0)
        if anyone and self.caught is None:
            self.caught = signal.SIGTERM  # another rank's
        return anyone

    def _release(self, trainer: L.Trainer) -> None:
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def in_worker(number: int) -> None:
    """What a handler does in a process that was forked with it: the run decides, and ends its workers with SIGTERM."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _awaits_validation(trainer: L.Trainer) -> bool:
    """Whether a schedule or a callback looks at a metric, which a validation may have to bring up to date."""
    plateaus = any(scheduler.reduce_on_plateau for scheduler in trainer.lr_scheduler_configs)
    return plateaus or any(getattr(each, "monitor", None) is not None for each in trainer.callbacks)  # type: ignore[attr-defined]


def _is_over(trainer: L.Trainer) -> bool:
    """Whether the step that ended was the run's last."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    return trainer.is_last_batch and epochs is not None and 0 <= epochs <= trainer.current_epoch + 1

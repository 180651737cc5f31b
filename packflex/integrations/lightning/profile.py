"""`ProfileSteps`: where the time of a few training steps goes, by torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn


class ProfileSteps(L.Callback):
    """Record some training batches and write `profile.txt` (operators by time) and `trace.json` (a timeline).

    Open the timeline in https://ui.perfetto.dev or chrome://tracing. Only rank 0 records.

    Args:
        dirpath: folder of the files; the trainer's `default_root_dir` when None.
        skip: batches before recording, so that compiling and warming up are left out.
        record: batches to record.
        rows: operators in the table.

    Raises:
        ValueError: numbers of batches below 0 or nothing to record.
    """

    def __init__(self, dirpath: str | Path | None = None, skip: int = 10, record: int = 5, rows: int = 30) -> None:
        if skip < 0 or record < 1:
            raise ValueError(f"skip must be at least 0 and record at least 1; got {skip} and {record}")
        self.dirpath, self.skip, self.record, self.rows = dirpath, skip, record, rows
        self._seen = 0
        self._profiler: torch.profiler.profile | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start when enough batches have passed."""
        if self._seen == self.skip and trainer.is_global_zero:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
        self._seen += 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop and write when the last of them is done."""
        if self._profiler is not None and self._seen == self.skip + self.record:
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what there is of a run that ended first; say so when there is nothing."""
        if self._profiler is not None:
            self._write(trainer)
        elif self._seen <= self.skip:
            rank_zero_warn(
                f"ProfileSteps recorded nothing: the run ended after {self._seen} batches, and it skips the first "
                f"{self.skip}; set skip lower (callbacks.profile.skip=... in the recipe)"
            )

    def _write(self, trainer: L.Trainer) -> None:
        assert self._profiler is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        folder = Path(trainer.default_root_dir if self.dirpath is None else self.dirpath)
        folder.mkdir(parents=True, exist_ok=True)
        averages = self._profiler.key_averages()
        by = "self_cuda_time_total" if any(e.self_device_time_total for e in averages) else "self_cpu_time_total"
        (folder / "profile.txt").write_text(averages.table(sort_by=by, row_limit=self.rows) + "\n", encoding="utf-8")
        self._profiler.export_chrome_trace(str(folder / "trace.json"))
        self._profiler = None

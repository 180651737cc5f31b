"""`AtomicCheckpointIO`: a checkpoint in one file is the new one or the old one, wherever a run is killed.

Lightning's own writes to a temporary file in $TMPDIR and moves it. Where that lies on another file system, moving is
copying: a kill meanwhile leaves half a checkpoint in place of the old one, and a small /tmp must hold all of it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside their place, flush them to the disk, then rename.

    With `Trainer(plugins=[AtomicCheckpointIO()])` all checkpoints in one file take this way, whoever asks for them:
    `ModelCheckpoint`, `SaveOnSignal`, `trainer.save_checkpoint`. A kill while `last.ckpt` is written leaves the
    `last.ckpt` before it, and a `.last.ckpt.partial` that the next write replaces. Checkpoints elsewhere than on this
    machine's file systems (`s3://...`) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: naming the file, when it cannot be written; what was there is left as it was.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(place)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            # torch's writer covers a full disk's error with one of its own
            reason = error if isinstance(error, OSError) else error.__context__
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, str(place)) from error
            raise
        _flush_names(place.parent)


def _is_local(path: _PATH) -> bool:
    return "file" in get_filesystem(path).protocol


def _flush_names(folder: Path) -> None:
    """Let a rename outlast the machine's end, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

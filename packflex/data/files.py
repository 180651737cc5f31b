"""Files that appear whole or not at all, and a lock for a folder that one process writes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from packflex.data.errors import DataError, one_line

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write to that becomes `path` when the block ends well, on the disk for good; else it is removed.

    Raises:
        DataError: no room on the disk, with the file and what to do.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with room_needed(path):
            yield partial
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as `np.save` does, whole or not at all.

    `np.save` itself loses the system's word for a full disk, and may lose the end of the array without a word.

    Raises:
        DataError: no room on the disk.
    """
    array = np.ascontiguousarray(array)
    with written_whole(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.view(np.uint8).data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def raise_full_disk(error: BaseException | None) -> None:
    """Raise the `OSError` of a full disk that lies behind another error, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise error
        error = error.__cause__ or error.__context__


@contextmanager
def room_needed(
    path: Path, remedy: str = "free some space and run the same command again: what is finished is kept"
) -> Iterator[None]:
    """Say plainly that the disk is full, or that nothing may be written there.

    Raises:
        DataError: in place of an `OSError` that says so.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(f"{path}: the disk is full ({one_line(error)}); {remedy}") from error
        if error.errno in _CLOSED:
            raise DataError(
                f"{path}: cannot be written ({one_line(error)}); choose another output, or make its folder writable"
            ) from error
        raise


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from writing to it; a process that dies lets go.

    Raises:
        DataError: another process holds it.
    """
    import fcntl  # here and not above: only packing to disk needs it, and it is missing on Windows

    with room_needed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{folder}: another `packflex pack` is writing there; wait for it, or choose another output"
            ) from error
        yield
    finally:
        os.close(descriptor)

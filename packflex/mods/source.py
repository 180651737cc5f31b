"""Printed kernels as files: readable, kept beside Triton's cache under the hash of their text, and loaded from there.

Triton finds a kernel's binary by its text, so that a second process that prints the same text compiles nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType


def source_folder() -> Path:
    """Where printed kernels are kept: `packflex` in Triton's cache folder."""
    import triton

    return Path(triton.knobs.cache.dir) / "packflex"


@cache
def load(text: str) -> ModuleType:
    """The module of a printed kernel, written to the cache folder first."""
    name = "mod_" + hashlib.sha256(text.encode()).hexdigest()[:24]
    path = source_folder() / f"{name}.py"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)  # another process sees a whole file or none
    spec = importlib.util.spec_from_file_location(f"packflex_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

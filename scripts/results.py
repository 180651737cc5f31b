"""Results of a benchmark, written whenever there is a new one: results.json for programs, table.md for people."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers


def environment(device: str, ranks: int = 1) -> dict[str, str]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()
    return {
        "devices": f"{ranks} x {name}",
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else "none",
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up as plain text."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write(out: Path, about: dict[str, Any], results: Any, table: str) -> None:
    """Both files, each whole or as it was before."""
    facts = ", ".join(f"{key} {value}" for key, value in about["environment"].items())
    texts = {
        "results.json": json.dumps({**about, "results": results}, indent=2),
        "table.md": f"{facts}\n\n{table}",
    }
    for name, text in texts.items():
        aside = out / f".{name}"
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, out / name)

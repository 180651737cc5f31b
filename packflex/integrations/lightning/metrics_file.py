"""`continue_metrics`: a run that goes on in the folder of its first part goes on in its `metrics.csv`."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger


def continue_metrics(logger: CSVLogger, step: int) -> None:
    """Keep what a `metrics.csv` holds of the steps before, and have the logger write on after it.

    By itself `CSVLogger` deletes the file at its first use. Call this on rank 0, before that.

    Args:
        logger: of the run that goes on.
        step: its first; rows of this and later steps, which it will do again, are left out.
    """
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))  # a kill can leave half a line
    rows = [row for row in reader if int(row["step"]) < step]
    names = list(reader.fieldnames or [])
    kept = path.with_name(".metrics.csv.kept")
    with kept.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    experiment = logger.experiment
    kept.replace(path)
    experiment.metrics_keys[:] = names

"""A `metrics.csv` that a resumed run goes on in."""

import pytest
from lightning.pytorch.loggers import CSVLogger

from packflex.integrations.lightning import continue_metrics
from packflex.report import read_metrics


def logger(folder):
    return CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("cut", [0, 1, 3], ids=["whole", "half a line end", "half a line"])
def test_rows_before_the_step_are_kept_and_written_on(tmp_path, cut):
    first = logger(tmp_path)
    for step in range(5):
        first.log_metrics({"train/loss": 1 / (step + 3)}, step)
    path = tmp_path / "metrics.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[: -cut or None])

    second = logger(tmp_path)
    continue_metrics(second, 3)
    assert path.read_bytes() == b"".join(lines[:4]), "as it was, to the bit"
    for step in range(3, 6):
        second.log_metrics({"train/loss": 10.0 * step, "val/loss": 0.5}, step)
    assert read_metrics(path, "train/loss") == (list(range(6)), [1 / 3, 1 / 4, 1 / 5, 30, 40, 50])
    assert read_metrics(path, "val/loss")[0] == [3, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_folder_without_one_is_left_alone(tmp_path):
    continue_metrics(logger(tmp_path / "new"), 3)
    assert not (tmp_path / "new").exists()

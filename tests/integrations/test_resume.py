"""Resume on other ranks, after max_steps, between epochs: every row of every epoch once, in its order."""

import functools
import logging
from collections import Counter

import lightning as L
import pytest
import torch
from datasets import Dataset

from packflex.data.collate import PackedCollator
from packflex.data.loader import PackedLoader
from packflex.data.stream import PackedStream
from packflex.integrations.lightning import PackedDataModule, PackFlexCallback, resume_loader
from packflex.integrations.lightning.resume import steps_to_come
from tests.integrations.test_lightning import pytestmark as quiet
from tests.integrations.test_lightning import trainer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = quiet
COUNT = 20
EVERY = list(range(1, COUNT + 1))
ROWS = Dataset.from_dict(
    {"input_ids": [[i] for i in EVERY], "labels": [[i] for i in EVERY], "lengths": [[1] for _ in EVERY]}
)
CALLBACK = functools.partial(PackFlexCallback, leak_check=False)


class Notes(L.LightningModule):
    """Notes each rank's rows in a file: the ranks are processes of their own."""

    def __init__(self, folder):
        super().__init__()
        self.weight, self.folder, self.rows = torch.nn.Parameter(torch.zeros(1)), folder, []

    def training_step(self, batch, batch_idx):
        self.rows.append([i for i in batch["input_ids"][:, 0].tolist() if i])
        torch.save(self.rows, self.folder / f"rank{self.global_rank}.pt")
        return (self.weight**2).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def data(batch_size=1):
    return PackedDataModule(ROWS, seq_len=4, batch_size=batch_size, seed=3)


def loader(batch_size=1):
    return PackedLoader(ROWS, PackedCollator(4), batch_size, seed=3)


def fit(folder, source, ranks=1, callbacks=(), ckpt_path=None, **options):
    """Batches of rows that each rank saw."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("rank*.pt"):
        old.unlink()
    many = {"devices": ranks, "strategy": "ddp_fork"} if ranks > 1 else {}
    runner = trainer(folder, callbacks, **{"max_steps": -1, **many, **options})
    given = {"datamodule": source} if isinstance(source, L.LightningDataModule) else {"train_dataloaders": source}
    runner.fit(Notes(folder), **given, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    seen = [torch.load(file) for file in sorted(folder.glob("rank*.pt"))]
    return runner, seen


def flat(seen, batches=None):
    return [row for rank in seen for batch in rank[:batches] for row in batch]


def order(epochs):
    """The rows of some epochs in their order on one rank."""
    unbroken = loader()
    return [int(batch["input_ids"][0, 0]) for _ in range(epochs) for batch in unbroken]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("callbacks", [[], [CALLBACK]], ids=["alone", "with the callback"])
def test_other_ranks_see_every_row_of_each_epoch_once(tmp_path, before, after, callbacks):
    made = [make() for make in callbacks]
    save = SaveAt(tmp_path / "five.ckpt", 5)
    _, first = fit(tmp_path / "before", data(), before, [save, *made], max_steps=6)
    made = [make() for make in callbacks]
    _, rest = fit(tmp_path / "after", data(), after, made, tmp_path / "five.ckpt", max_epochs=3)
    left = COUNT - 5 * before
    assert [len(rank) for rank in rest] == [-(-left // after) + 2 * COUNT // after] * after
    assert sorted(flat(first, 5) + flat(rest, -(-left // after))) == EVERY, "the epoch that was resumed"
    assert Counter(flat(first, 5) + flat(rest)) == dict.fromkeys(EVERY, 3)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 2)])
def test_another_batch_size_too(tmp_path, before, after):
    _, first = fit(tmp_path / "before", data(before), 1, [SaveAt(tmp_path / "x.ckpt", 3)], max_steps=4)
    runner, rest = fit(tmp_path / "after", data(after), ckpt_path=tmp_path / "x.ckpt", max_epochs=3)
    assert Counter(flat(first, 3) + flat(rest)) == dict.fromkeys(EVERY, 3)
    state = {"epoch": 0, "consumed": 3 * before, "delivered": 3, "started": True}
    assert runner.global_step == 3 + steps_to_come(COUNT, after, 1, 3, state)
    assert runner.reload_dataloaders_every_n_epochs == 0, "as it was"


def test_validation_comes_at_the_end_of_each_epoch(tmp_path):
    """Its place is counted from the epoch's length, which Lightning reads once."""
    ends = []

    class Notice(L.Callback):
        def on_validation_start(self, trainer, *_):
            if not trainer.sanity_checking:
                ends.append(trainer.global_step)

    class Validates(Notes):
        def validation_step(self, batch, batch_idx):
            pass

    fit(tmp_path / "before", data(1), 1, [SaveAt(tmp_path / "x.ckpt", 10)], max_steps=11)
    both = PackedDataModule(ROWS, ROWS, seq_len=4, batch_size=2, seed=3)
    runner = trainer(tmp_path, [Notice()], max_steps=-1, max_epochs=3)
    runner.fit(Validates(tmp_path), both, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    assert ends == [15, 25, 35]


def test_a_loader_of_ones_own_is_given_its_state_first_or_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    _, first = fit(tmp_path / "before", loader(), 1, [SaveAt(path, 5)], max_steps=6)
    with pytest.raises(
        ValueError,
        match=r"epoch has 13 batches, 5 before .* len\(\) was read as 10 before .* use PackedDataModule, or call "
        r"packflex\.integrations\.lightning\.resume_loader\(loader, ckpt_path\)",
    ):
        fit(tmp_path / "refused", loader(2), 1, [CALLBACK()], path, max_epochs=3)
    mine = loader(2)
    resume_loader(mine, path)
    _, rest = fit(tmp_path / "after", mine, 1, [CALLBACK()], path, max_epochs=3)
    assert Counter(flat(first, 5) + flat(rest)) == dict.fromkeys(EVERY, 3)
    torch.save({"loops": {}}, tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"none\.ckpt: holds the states of 0 training loaders"):
        resume_loader(loader(), tmp_path / "none.ckpt")


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 3 * COUNT}], ids=["epochs", "steps"])
@pytest.mark.parametrize("make", [data, loader])
def test_a_run_that_max_steps_ended_goes_on_within_its_epoch(tmp_path, make, limits):
    runner, first = fit(tmp_path / "before", make(), max_steps=7)
    runner.save_checkpoint(tmp_path / "end.ckpt")
    assert flat(first) == order(3)[:7]
    runner, rest = fit(tmp_path / "after", make(), 1, [CALLBACK()], tmp_path / "end.ckpt", **limits)
    assert flat(rest) == order(3)[7:]
    assert runner.current_epoch == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_such_a_run_logs_the_steps_that_come_next(tmp_path, accumulate):
    """Also where a validation is due at the step where it stopped, which Lightning does not repeat."""

    class Logs(L.pytorch.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            steps.append(step)

    class Validates(Notes):
        def training_step(self, batch, batch_idx):
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            pass

    both = PackedDataModule(ROWS, ROWS, seq_len=4, batch_size=1, seed=3)
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": accumulate, "log_every_n_steps": 1}
    steps, runs = [], []
    for until in (3, 6):
        runs.append(trainer(tmp_path, [CALLBACK()], max_steps=until, logger=Logs(tmp_path), **options))
        resumed = {"ckpt_path": tmp_path / "end.ckpt", "weights_only": False} if runs[1:] else {}
        runs[-1].fit(Validates(tmp_path), both, **resumed)
        runs[-1].save_checkpoint(tmp_path / "end.ckpt")
    assert steps == list(range(6))


def test_without_the_callback_such_a_run_is_refused(tmp_path):
    runner, _ = fit(tmp_path / "before", data(), max_steps=7)
    runner.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(ValueError, match=r"end\.ckpt: written after a run that max_steps .* add PackFlexCallback"):
        fit(tmp_path / "after", data(), ckpt_path=tmp_path / "end.ckpt", max_epochs=3)


def stream():
    source = Dataset.from_dict({"input_ids": [[i] * 4 for i in EVERY]}).to_iterable_dataset(num_shards=2)
    return PackedStream(source, PackedCollator(4), 1, seq_len=4, num_batches=8, pool=4)


@pytest.mark.parametrize("make", [data, loader, stream])
def test_a_checkpoint_between_two_epochs(tmp_path, make):
    """Lightning takes it for a new run of the loader, which would repeat the first epoch's order, or its documents."""
    _, whole = fit(tmp_path / "whole", make(), 1, [CALLBACK()], max_epochs=3)
    runner, first = fit(tmp_path / "before", make(), 1, [CALLBACK()], max_epochs=1)
    runner.save_checkpoint(tmp_path / "end.ckpt")
    _, rest = fit(tmp_path / "after", make(), 1, [CALLBACK()], tmp_path / "end.ckpt", max_epochs=3)
    assert flat(first) + flat(rest) == flat(whole)

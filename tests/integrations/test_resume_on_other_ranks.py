"""An epoch that goes on over another number of ranks, or with another batch size, shows each row exactly once."""

from collections import Counter

import lightning as L
import pytest
import torch
from datasets import Dataset

from packflex.data.collate import PackedCollator
from packflex.data.loader import PackedLoader
from packflex.integrations.lightning import PackedDataModule, PackFlexCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`:UserWarning"),
]
ROWS = 21
DATA = Dataset.from_dict(
    {"input_ids": [[i + 1] for i in range(ROWS)], "labels": [[i + 1] for i in range(ROWS)], "lengths": [[1]] * ROWS}
)


class Seen(L.LightningModule):
    """Notes which rows each rank has trained on, and saves a checkpoint after `save_at` steps."""

    def __init__(self, folder, save_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder, self.save_at, self.rows = folder, save_at, []

    def training_step(self, batch, batch_idx):
        self.rows += [row for row in batch["input_ids"][:, 0].tolist() if row]
        return (self.weight**2).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.save_at is not None and self.trainer.global_step == self.save_at:
            torch.save(self.rows, self.folder / f"before{self.trainer.global_rank}.pt")
            self.trainer.save_checkpoint(self.folder / "middle.ckpt")

    def on_train_end(self):
        torch.save([self.rows, self.trainer.global_step], self.folder / f"after{self.trainer.global_rank}.pt")


def fit(folder, ranks, batch_size, *, save_at=None, resume=False, data=None, callbacks=(), **limits):
    strategy = {"devices": ranks, "strategy": "ddp_fork"} if ranks > 1 else {"devices": 1}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks), **strategy, **limits,
    )  # fmt: skip
    data = PackedDataModule(DATA, seq_len=4, batch_size=batch_size, seed=3) if data is None else data
    checkpoint = {"ckpt_path": folder / "middle.ckpt", "weights_only": True} if resume else {}
    trainer.fit(Seen(folder, save_at), data, **checkpoint)


def test_an_epoch_that_max_steps_cut_off_is_not_taken_for_a_whole_one(tmp_path):
    """Lightning counts it as one; the callback takes that back."""
    data = PackedDataModule(DATA, seq_len=4, batch_size=2, seed=3)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    first = L.Trainer(max_steps=3, **options)
    module = Seen(tmp_path)
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "middle.ckpt")
    fit(tmp_path, 1, 2, resume=True, max_steps=22)
    assert Counter(module.rows + rows_of(tmp_path, "after", 1)) == Counter(2 * list(range(1, ROWS + 1)))
    fit(tmp_path, 1, 2, resume=True, max_epochs=2, callbacks=[PackFlexCallback(leak_check=False)])
    assert Counter(module.rows + rows_of(tmp_path, "after", 1)) == Counter(2 * list(range(1, ROWS + 1)))


def rows_of(folder, part, ranks):
    found = [torch.load(folder / f"{part}{rank}.pt") for rank in range(ranks)]
    return [row for rows in found for row in (rows if part == "before" else rows[0])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [((1, 1, 5), (2, 1), 13), ((2, 1, 3), (1, 1), 18), ((1, 2, 2), (1, 1), 19), ((1, 1, 4), (2, 2), 9)],
    ids=["1 to 2 ranks", "2 to 1 ranks", "batches of 2 to 1", "1 to 2 ranks and batches"],
)
def test_every_row_once(tmp_path, before, after, steps):
    ranks, batch_size, save_at = before
    fit(tmp_path, ranks, batch_size, save_at=save_at, max_steps=save_at + 1)
    first = rows_of(tmp_path, "before", ranks)
    assert len(first) == ranks * batch_size * save_at
    fit(tmp_path, *after, resume=True, max_epochs=1)
    counts = Counter(first + rows_of(tmp_path, "after", after[0]))
    assert counts == Counter(range(1, ROWS + 1))
    assert torch.load(tmp_path / "after0.pt")[1] == steps


def test_the_next_epoch_is_whole(tmp_path):
    fit(tmp_path, 1, 2, save_at=3, max_steps=4)
    fit(tmp_path, 1, 1, resume=True, max_epochs=2)
    counts = Counter(rows_of(tmp_path, "before", 1) + rows_of(tmp_path, "after", 1))
    assert counts == Counter(2 * list(range(1, ROWS + 1)))


def test_a_validation_before_leaves_no_position_behind(tmp_path):
    """`validate(ckpt_path=)` reads the position; a fit without a checkpoint begins at the beginning."""
    fit(tmp_path, 1, 1, save_at=5, max_steps=6)
    data = PackedDataModule(DATA, seq_len=4, batch_size=1, seed=3)
    data.load_state_dict(torch.load(tmp_path / "middle.ckpt", weights_only=True)["PackedDataModule"])
    fit(tmp_path, 1, 1, data=data, max_epochs=1)
    assert Counter(rows_of(tmp_path, "after", 1)) == Counter(range(1, ROWS + 1))


def test_a_loader_of_ones_own_is_not_cut_short(tmp_path):
    """Lightning reads its length before its state: the loader says so instead of leaving rows out."""

    def loader(batch_size):
        return PackedLoader(DATA, PackedCollator(4), batch_size, seed=3)

    fit(tmp_path, 1, 2, save_at=3, max_steps=4, data=loader(2))
    with pytest.raises(ValueError, match=r"len\(\) was read as 21 before the state was loaded.*use PackedDataModule"):
        fit(
            tmp_path, 1, 1, resume=True, max_epochs=1, data=loader(1), callbacks=[PackFlexCallback(leak_check=False)]
        )  # fmt: skip

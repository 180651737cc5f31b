"""Random states in checkpoints: with dropout, a resumed run goes on as the one that was never stopped."""

import logging
import random

import lightning as L
import numpy as np
import pytest
import torch

from packflex.integrations.lightning import CausalLMModule, KeepRandomState, PackedDataModule, PackFlexCallback
from tests.integrations.test_lightning import SEQ_LEN, SGD, packed_rows, tiny_model, trainer
from tests.integrations.test_lightning import pytestmark as quiet

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = quiet
STEPS, STOP = 6, 3


def dropout_model(seed=0):
    model = tiny_model(seed)
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: torch.nn.functional.dropout(out, 0.3, module.training)
    )
    return model


class Noisy(CausalLMModule):
    """Draws from every generator, and notes what each step drew and lost in a file: ranks are processes."""

    def __init__(self, folder):
        super().__init__(dropout_model(), SGD)
        self.folder, self.seen = folder, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append((float(loss.detach()), random.random(), float(np.random.rand())))
        torch.save(self.seen, self.folder / f"rank{self.global_rank}.pt")
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        torch.rand(1), random.random(), np.random.rand()


class SeedByRank(L.Callback):
    """Ranks that draw different numbers."""

    def on_train_start(self, trainer, pl_module):
        seed(trainer.global_rank)


class SaveAtStop(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == STOP:
            trainer.save_checkpoint(trainer.default_root_dir + "/stop.ckpt")


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def data():
    rows = packed_rows()
    return PackedDataModule(rows, rows.select(range(2)), seq_len=SEQ_LEN, batch_size=1, seed=5)


def fit(folder, *callbacks, ranks=1, resume=None):
    """What each rank saw of each of its steps."""
    folder.mkdir()
    many = {"devices": ranks, "strategy": "ddp_fork"} if ranks > 1 else {}
    run = trainer(folder, [*callbacks, PackFlexCallback(), SaveAtStop()], max_steps=STEPS, **many)
    module, rows = Noisy(folder), data()
    checkpoint = {} if resume is None else {"ckpt_path": resume / "stop.ckpt", "weights_only": True}
    if resume is not None and ranks == 1:  # as the recipe does
        run.validate(module, rows, verbose=False, **checkpoint)
    run.fit(module, rows, **checkpoint)
    return [torch.load(file) for file in sorted(folder.glob("rank*.pt"))]


def test_a_resumed_run_draws_what_would_have_come(tmp_path):
    seed(1)
    (whole,) = fit(tmp_path / "whole", KeepRandomState())
    seed(2)
    (rest,) = fit(tmp_path / "rest", KeepRandomState(), resume=tmp_path / "whole")
    assert rest == whole[STOP:], "bitwise"
    seed(2)
    (without,) = fit(tmp_path / "without", resume=tmp_path / "whole")
    for own, right in zip(without, whole[STOP:], strict=True):
        assert all(a != b for a, b in zip(own, right, strict=True)), "it takes the callback"


@pytest.mark.slow
def test_each_rank_has_its_own_state(tmp_path):
    """The same number of ranks goes on bitwise; on one rank, and from one on two, a run goes on with some state."""
    two = fit(tmp_path / "two", KeepRandomState(), SeedByRank(), ranks=2)
    assert two[0][0][1:] != two[1][0][1:]
    saved = torch.load(tmp_path / "two" / "stop.ckpt", weights_only=True)["KeepRandomState"]
    assert len(saved) == 2
    seed(7)
    assert fit(tmp_path / "again", KeepRandomState(), ranks=2, resume=tmp_path / "two") == [rank[STOP:] for rank in two]
    (one,) = fit(tmp_path / "one", KeepRandomState(), resume=tmp_path / "two")
    assert one[0][1:] == two[0][STOP][1:], "the first rank's"
    (single,) = fit(tmp_path / "single", KeepRandomState())
    more = fit(tmp_path / "more", KeepRandomState(), ranks=2, resume=tmp_path / "single")
    assert [rank[0][1:] for rank in more] == [single[STOP][1:]] * 2

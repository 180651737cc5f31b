"""Runs that are interrupted, go wrong or run out of memory: what is saved and what is said."""

import logging
import os
import re
import resource
import signal
import tempfile
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from packflex import PackedLayout
from packflex.data.collate import PackedCollator
from packflex.integrations.lightning import (
    AtomicCheckpointIO,
    CausalLMModule,
    NonFiniteLossError,
    NonFiniteLossGuard,
    PackedDataModule,
    PackFlexCallback,
    ProfileSteps,
    SaveOnSignal,
    is_out_of_memory,
)
from packflex.integrations.transformers import enable_packflex
from packflex.parallel.layout import shard_batch
from tests.integrations.test_lightning import SEQ_LEN, SGD, Recorder, packed_rows, trainer
from tests.integrations.test_lightning import pytestmark as quiet
from tests.integrations.test_lightning import tiny_model as plain_model

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = quiet
BAD = 63  # a token whose embedding comes out as NaN in these tests


def tiny_model(seed=0):
    """One that needs no `PackFlexCallback`."""
    model = plain_model(seed)
    enable_packflex(model)
    return model


class SendSignal(L.Callback):
    """A signal to this very process, while a batch is worked on."""

    def __init__(self, number, batch):
        self.number, self.batch = number, batch

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


class SignalOutside(L.Callback):
    """A signal to this very process in its n-th validation, or as training ends."""

    def __init__(self, number, validation=None):
        self.number, self.validation, self.seen = number, validation, 0

    def on_validation_batch_end(self, *_):
        self.seen += 1
        if self.seen == self.validation:
            os.kill(os.getpid(), self.number)

    def on_train_end(self, *_):
        if self.validation is None:
            os.kill(os.getpid(), self.number)


def data(batch_size=2):
    return PackedDataModule(packed_rows(), seq_len=SEQ_LEN, batch_size=batch_size, seed=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("batch", [4, 5], ids=["in the middle of accumulation", "at its end"])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(tmp_path, number, batch):
    whole, first, second = Recorder(), Recorder(), Recorder()
    options = {"max_steps": 6, "accumulate_grad_batches": 2}
    trainer(tmp_path, [whole], **options).fit(CausalLMModule(tiny_model(), SGD), data())
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    stopper = SaveOnSignal(tmp_path)
    stopped = trainer(tmp_path, [first, stopper, SendSignal(number, batch)], **options)
    stopped.fit(CausalLMModule(tiny_model(), SGD), data())
    assert stopper.caught == number
    assert stopped.global_step == 3, "the optimizer step that was under way is finished"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers

    resumed = trainer(tmp_path, [second], **options)
    resumed.fit(CausalLMModule(tiny_model(seed=1), SGD), data(), ckpt_path=stopper.checkpoint, weights_only=True)
    assert resumed.global_step == 6
    steps = len(second.losses)
    assert second.losses == whole.losses[-steps:], "bitwise"
    assert second.losses != first.losses[:steps]
    assert all(torch.equal(a, b) for a, b in zip(whole.gradients, second.gradients, strict=True))


class Validations(L.Callback):
    """Steps after which a validation began, in a file of each rank."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_start(self, trainer, pl_module):
        with (self.folder / f"validations{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} ")

    def seen(self, rank=0):
        path = self.folder / f"validations{rank}"
        return path.read_text().split() if path.exists() else []


def fit_with_signal(tmp_path, batch, *callbacks):
    """A signal in that batch, of four epochs of 10 with validations."""
    rows = packed_rows().select(range(10))
    held = PackedDataModule(rows, rows, seq_len=SEQ_LEN, batch_size=1, seed=5)
    callbacks = [*callbacks, SaveOnSignal(tmp_path), SendSignal(signal.SIGTERM, batch)]
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    fit = trainer(tmp_path, callbacks, max_steps=-1, max_epochs=4, **options)
    module = CausalLMModule(tiny_model(), SGD)
    fit.fit(module, held)
    assert fit.global_step == batch + 1
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == batch + 1
    return fit.validate(module, held, verbose=False)[0]["val/loss"]


BATCHES = pytest.mark.parametrize(
    ("batch", "before"),
    [(4, []), (9, []), (10, ["10"]), (15, ["10"])],
    ids=["middle of the first epoch", "its end", "start of the second", "its middle"],
)


@BATCHES
def test_no_validation_comes_after_the_checkpoint_of_a_signal(tmp_path, batch, before):
    validations = Validations(tmp_path)
    loss = fit_with_signal(tmp_path, batch, ModelCheckpoint(tmp_path, monitor=None), validations)
    assert validations.seen() == [*before, str(batch + 1)], "the last by `validate`: the trainer validates as before"
    assert loss > 0


@BATCHES
@pytest.mark.parametrize("at_end", [True, False, None])
@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_callback_with_a_monitor_gets_its_metric_at_a_signal_too(tmp_path, batch, before, at_end, kind):
    """Early stopping would raise, and the checkpoint hold the weights under the loss of older ones."""
    if kind is EarlyStopping:
        waits = EarlyStopping("val/loss", check_on_train_epoch_end=at_end)
    else:
        waits = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, save_on_train_epoch_end=at_end)
    validations = Validations(tmp_path)
    loss = fit_with_signal(tmp_path, batch, validations, waits)
    last = str(batch + 1)
    assert validations.seen() == [*before, last, last], "of fit, and of `validate`"
    score = waits.best_score if kind is EarlyStopping else waits.current_score
    assert float(score) == pytest.approx(loss, rel=1e-6)


def test_a_schedule_by_the_heldout_loss_gets_it_at_a_signal_too(tmp_path):
    class Plateau(CausalLMModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    rows = packed_rows().select(range(6))
    held = PackedDataModule(rows, rows, seq_len=SEQ_LEN, batch_size=1, seed=5)
    stopper = SaveOnSignal(tmp_path)
    fit = trainer(tmp_path, [stopper, SendSignal(signal.SIGTERM, 5)], max_steps=-1, max_epochs=4)
    fit.fit(Plateau(tiny_model(), SGD), held)
    assert stopper.checkpoint is not None


@pytest.mark.parametrize(
    ("limits", "batch"),
    [
        ({"max_steps": 3}, 2),
        ({"max_steps": 2, "accumulate_grad_batches": 2}, 2),
        ({"max_steps": -1, "max_epochs": 2}, -1),
    ],
    ids=["steps", "accumulated", "epochs"],
)
def test_a_signal_during_the_last_step_changes_nothing(tmp_path, limits, batch):
    rows = packed_rows().select(range(6))
    source = PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=2, seed=5)
    last = batch if batch >= 0 else 2 * 3 - 1
    for at, ends in ((last - limits.get("accumulate_grad_batches", 1), False), (last, True)):
        stopper = SaveOnSignal(tmp_path)
        fit = trainer(tmp_path, [stopper, SendSignal(signal.SIGTERM, at)], **limits)
        fit.fit(CausalLMModule(tiny_model(), SGD), source)
        assert stopper.caught == signal.SIGTERM
        assert (stopper.checkpoint is None) is ends
        assert (tmp_path / "interrupted.ckpt").exists() is not ends
        assert fit.should_stop is not ends
        (tmp_path / "interrupted.ckpt").unlink(missing_ok=True)


def test_a_second_ctrl_c_stops_at_once(capfd):
    stopper = SaveOnSignal()
    stopper._note(signal.SIGINT, None)
    assert capfd.readouterr().err == "\nFinishing the step, then saving; Ctrl-C again stops at once\n"
    stopper._note(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        stopper._note(signal.SIGINT, None)
    assert stopper.caught == signal.SIGINT
    assert capfd.readouterr().err == ""


class EndedError(BaseException):
    pass


def test_a_second_ctrl_c_goes_to_who_had_it_before(tmp_path, capfd):
    def ends(number, frame):
        raise EndedError

    stopper, sent = SaveOnSignal(tmp_path), [SendSignal(n, 1) for n in (signal.SIGTERM, signal.SIGINT)]
    handler = signal.signal(signal.SIGINT, ends)
    try:
        with pytest.raises(EndedError):
            trainer(tmp_path, [stopper, *sent]).fit(CausalLMModule(tiny_model(), SGD), data())
        assert signal.getsignal(signal.SIGINT) is ends
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (stopper.caught, stopper.checkpoint) == (signal.SIGTERM, None)
    assert "Finishing the step, then saving; Ctrl-C stops at once" in capfd.readouterr().err


class SendToOne(SendSignal):
    """The signal to one rank alone."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank == 1:
            super().on_before_backward(trainer, pl_module, loss)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    """At once, however slow the steps are: schedulers wait for half a minute."""
    callbacks = [SaveOnSignal(tmp_path), SendToOne(signal.SIGTERM, 2), Validations(tmp_path)]
    every_two = {"val_check_interval": 2, "num_sanity_val_steps": 0}
    fit = trainer(tmp_path, callbacks, max_steps=8, devices=2, strategy="ddp_fork", **every_two)
    rows = packed_rows()
    held = PackedDataModule(rows, rows.select(range(4)), seq_len=SEQ_LEN, batch_size=1, seed=5)
    fit.fit(CausalLMModule(tiny_model(), SGD), held)
    assert [callbacks[-1].seen(rank) for rank in range(2)] == [["2"], ["2"]], "none as they stop"
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == 3


def poisoned_model():
    model = tiny_model()
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: torch.where((args[0] == BAD)[..., None], torch.nan, out)
    )
    return model


def test_a_loss_of_nan_stops_with_its_batch_and_documents(tmp_path):
    rows = packed_rows()
    at = [BAD in ids for ids in rows["input_ids"]]
    first = at.index(True)
    module = CausalLMModule(poisoned_model(), SGD)
    before = [p.clone() for p in module.parameters()]
    sequential = PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=1, order="sequential")
    fit = trainer(tmp_path, [PackFlexCallback(leak_check=False), NonFiniteLossGuard()], max_steps=len(rows))
    with pytest.raises(NonFiniteLossError, match="the loss is nan") as error:
        fit.fit(module, sequential)
    assert fit.global_step == first
    assert all(p.isfinite().all() for p in module.parameters()), "the bad gradients were never applied"
    assert first == 0 or any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))

    saved = torch.load(tmp_path / "nonfinite_batch.pt", weights_only=True)
    assert saved["lengths"] == [rows[first]["lengths"]]
    assert saved["input_ids"][0, : len(rows[first]["input_ids"])].tolist() == rows[first]["input_ids"]
    start, bad = 0, []
    for d, length in enumerate(rows[first]["lengths"]):
        if BAD in rows[first]["input_ids"][start : start + length]:
            bad.append(d)
        start += length
    named = str(error.value).split("are not finite: ")[1]
    for d in range(len(rows[first]["lengths"])):
        assert (f"document {d} of row 0" in named) is (d in bad)


def test_the_guard_looks_one_batch_back_where_the_host_runs_ahead(tmp_path):
    """As on a GPU: the loss before is looked at, and the last one when training ends."""

    class Late(NonFiniteLossGuard):
        def on_before_backward(self, trainer, pl_module, loss):
            now = (self._batch, loss.detach(), (~loss.detach().isfinite()).float(), trainer.global_step)
            before, self._waiting = self._waiting, now
            if before is not None:
                self._check(trainer, pl_module, before)

    rows = packed_rows()
    first = [BAD in ids for ids in rows["input_ids"]].index(True)
    for steps in (first + 1, first + 2):
        sequential = PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=1, order="sequential")
        names = lambda ids, lengths, d: f"number {d} of {len(ids)} tokens"  # noqa: E731
        guard = Late(tmp_path / str(steps), name_document=names)
        fit = trainer(tmp_path, [PackFlexCallback(leak_check=False), guard], max_steps=steps)
        with pytest.raises(NonFiniteLossError, match=r"number 0 of \d+ tokens.* Weights are not finite either"):
            fit.fit(CausalLMModule(poisoned_model(), SGD), sequential)
        saved = torch.load(tmp_path / str(steps) / "nonfinite_batch.pt", weights_only=True)
        assert saved["lengths"] == [rows[first]["lengths"]]


class SpoilWeights(L.Callback):
    """What the last optimizer step leaves: one such weight, or a head whose logits overflow."""

    def __init__(self, step, weight=None):
        self.step, self.weight = step, weight

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step != self.step:
            return
        if self.weight is not None:
            pl_module.model.model.embed_tokens.weight[0, 0] = self.weight
            return
        for part in (pl_module.model.model.norm, pl_module.model.lm_head):
            part.weight.mul_(1e25)


@pytest.mark.parametrize(
    ("spoiled", "found"),
    [
        ({"weight": torch.nan}, "the weights are not finite after 2 optimizer steps. Saved the batch to "),
        ({"weight": -torch.inf}, "the weights are not finite after 2 optimizer steps. Saved the batch to "),
        (
            {},
            "the weights are finite, but give the last batch a loss of nan after 2 optimizer steps. Saved",
        ),
    ],
    ids=["nan", "infinity", "too large"],
)
def test_weights_that_the_last_step_spoils_end_the_run(tmp_path, spoiled, found):
    model = tiny_model()
    fit = trainer(tmp_path, [PackFlexCallback(), NonFiniteLossGuard(), SpoilWeights(2, **spoiled)], max_steps=2)
    with pytest.raises(NonFiniteLossError, match=re.escape(found)) as error:
        fit.fit(CausalLMModule(model, SGD), data())
    said = str(error.value)
    assert re.search(r"document 0 of row 0 \(\d+ tokens: .*Go on from a checkpoint of an earlier step, if one", said)
    assert len(torch.load(tmp_path / "nonfinite_batch.pt", weights_only=True)["lengths"]) == 2
    assert model.training, "as it was"


class OwnTargets(CausalLMModule):
    """Labels come under another name."""

    def training_step(self, batch, batch_idx):
        labels = batch["targets"]
        return super().training_step({k: v for k, v in batch.items() if k != "targets"} | {"labels": labels}, batch_idx)


class RenameLabels(L.LightningDataModule):
    """Batches for `OwnTargets`."""

    def train_dataloader(self):
        batches = [PackedCollator(SEQ_LEN)([row]) for row in packed_rows().select(range(2))]
        renamed = [{"targets" if name == "labels" else name: v for name, v in each.items()} for each in batches]
        return torch.utils.data.DataLoader(renamed, batch_size=None)


@pytest.mark.parametrize(
    "frozen",
    [torch.zeros(4).to(torch.float8_e4m3fn), torch.tensor([0.0, -torch.inf]), None],
    ids=["float8", "minus infinity", "other batches"],
)
def test_the_look_at_the_end_passes_what_no_step_changed(tmp_path, frozen):
    """Frozen weights of types without `isfinite` and infinite ones, and steps that make batches of their own."""
    module = CausalLMModule(tiny_model(), SGD) if frozen is not None else OwnTargets(tiny_model(), SGD)
    if frozen is not None:
        module.model.register_parameter("frozen", torch.nn.Parameter(frozen, requires_grad=False))
    fit = trainer(tmp_path, [PackFlexCallback(leak_check=False), NonFiniteLossGuard()], max_steps=2)
    fit.fit(module, data() if frozen is not None else RenameLabels())
    assert fit.global_step == 2


class FrozenPart(L.Callback):
    """A part in evaluation mode, and the random state as training ends, before and after the guard's look."""

    def __init__(self, states):
        self.states = states

    def on_train_batch_start(self, trainer, pl_module, *_):
        pl_module.model.model.layers[0].eval()

    def on_train_end(self, trainer, pl_module):
        self.states.append((torch.get_rng_state(), [part.training for part in pl_module.modules()]))


def test_the_look_at_the_end_changes_nothing(tmp_path):
    """Neither random states, which a checkpoint will hold, nor modes."""
    states = []
    callbacks = [PackFlexCallback(leak_check=False), FrozenPart(states), NonFiniteLossGuard(), FrozenPart(states)]
    module = CausalLMModule(tiny_model(), SGD)
    module.dropout = torch.nn.Dropout(0.5)
    module.model.model.embed_tokens.register_forward_hook(lambda part, args, out: module.dropout(out))
    trainer(tmp_path, callbacks, max_steps=2).fit(module, data())
    (before, modes), (after, modes_after) = states
    assert torch.equal(before, after)
    assert modes == modes_after
    assert {True, False} == set(modes)


class Noting(NonFiniteLossGuard):
    """Notes what it says on each rank in a file, before the first process to end has the others killed."""

    def _check(self, *arguments):
        try:
            super()._check(*arguments)
        except NonFiniteLossError as error:
            (self.dirpath / f"rank{torch.distributed.get_rank()}").write_text(str(error))
            torch.distributed.barrier()
            raise


class SpoilOne(SpoilWeights):
    """On one rank alone."""

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        if trainer.global_rank == 1:
            super().on_train_batch_end(trainer, pl_module, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", [{"weight": torch.nan}, {}], ids=["nan", "too large"])
def test_all_ranks_stop_at_weights_that_the_last_step_spoils_on_one(tmp_path, spoiled):
    class NotingEnd(NonFiniteLossGuard):
        def _check_end(self, trainer, pl_module):
            with pytest.raises(NonFiniteLossError) as error:
                super()._check_end(trainer, pl_module)
            (tmp_path / f"rank{trainer.global_rank}").write_text(str(error.value))

    callbacks = [PackFlexCallback(leak_check=False), NotingEnd(tmp_path), SpoilOne(2, **spoiled)]
    fit = trainer(tmp_path, callbacks, max_steps=2, devices=2, strategy="ddp_fork")
    fit.fit(CausalLMModule(tiny_model(), SGD), data(batch_size=1))
    messages = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    if "weight" in spoiled:
        assert "not finite after 2 optimizer steps" in messages[0]
    else:
        assert "but give the last batch of rank 1 a loss of nan" in messages[0]
        assert "of rank 0" not in messages[0]


@pytest.mark.slow
def test_all_ranks_stop_with_the_message_of_the_one_whose_loss_it_is(tmp_path):
    rows = packed_rows()
    # on two ranks row i is rank i % 2's, so the first bad row decides whose loss it is
    first = [BAD in ids for ids in rows["input_ids"]].index(True)
    data = PackedDataModule(rows, seq_len=SEQ_LEN, batch_size=1, order="sequential")
    callbacks = [PackFlexCallback(leak_check=False), Noting(tmp_path)]
    fit = trainer(tmp_path, callbacks, max_steps=len(rows), devices=2, strategy="ddp_fork")
    with pytest.raises(mp.ProcessRaisedException):
        fit.fit(CausalLMModule(poisoned_model(), SGD), data)
    messages = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    bad = [rank for rank in range(2) if f"the loss of rank {rank} is nan" in messages[0]]
    assert first % 2 in bad
    assert f"after {first // 2} optimizer steps" in messages[0]
    assert "documents whose logits are not finite: document " in messages[0]
    assert {path.name for path in tmp_path.glob("*.pt")} == {f"nonfinite_batch_rank{rank}.pt" for rank in bad}


def test_the_losses_of_several_ranks_are_told_apart(tmp_path, monkeypatch):
    def of_two_ranks(own, ranks):
        return [own, own.replace("rank 0", "rank 1")] if isinstance(own, str) else [own, own]

    monkeypatch.setattr("packflex.integrations.lightning.guard.gathered", of_two_ranks)
    fit = SimpleNamespace(world_size=2, global_rank=0, default_root_dir=tmp_path)
    layout = PackedLayout.from_lengths([[3]])
    ids = torch.ones(1, 3, dtype=torch.long)
    item = ({"input_ids": ids, "packed": layout}, torch.tensor(torch.nan), torch.tensor(1.0), 7)
    weight = torch.tensor(torch.inf, requires_grad=True)
    with pytest.raises(NonFiniteLossError) as error:
        NonFiniteLossGuard()._check(fit, SimpleNamespace(parameters=lambda: [weight]), item)
    named = "documents of the batch: document 0 of row 0 (3 tokens: 1 1 1 ...)"
    text = str(error.value)
    assert f"{named}; also the loss of rank 1 is nan" in text
    assert f"{named}. Weights are not finite either: go on from a checkpoint of an earlier step. Common causes:" in text


def test_documents_of_a_batch_that_ranks_share_are_named(tmp_path):
    """Context parallelism: pieces of documents, by their number in the batch."""
    layout = PackedLayout.from_lengths([[40, 3, 5]], 64)
    ids = torch.arange(1, 65)[None]
    whole = {"input_ids": ids, "labels": ids.clone(), "position_ids": layout.position_ids, "packed": layout}
    guard, seen = NonFiniteLossGuard(tmp_path), set()
    for rank in range(2):
        batch = shard_batch(whole, 2, rank)
        fit = SimpleNamespace(world_size=1, global_rank=rank, default_root_dir=tmp_path)
        module = CausalLMModule(tiny_model(), SGD)
        with pytest.raises(NonFiniteLossError, match="documents of the batch: document") as error:
            guard._check(fit, module, (batch, torch.tensor(torch.nan), torch.tensor(1.0), 7))
        found = re.findall(r"document (\d+) of the shared batch \((\d+) tokens: ([\d ]+) \.\.\.\)", str(error.value))
        pieces = batch["packed"].mine
        assert [(int(d), int(n)) for d, n, _ in found] == [(p.document, p.end - p.start) for p in pieces]
        starts = (0, 40, 43)
        assert [int(first.split()[0]) for *_, first in found] == [1 + starts[p.document] + p.start for p in pieces]
        saved = torch.load(tmp_path / "nonfinite_batch.pt", weights_only=True)
        assert saved["pieces"] == [[p.document, p.start, p.end] for p in pieces]
        assert saved["lengths"] == [40, 3, 5]
        seen |= {p.document for p in pieces}
    assert seen == {0, 1, 2}


def test_what_running_out_of_memory_looks_like():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_out_of_memory_names_the_settings(tmp_path):
    class Hungry(CausalLMModule):
        def training_step(self, batch, batch_idx):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer(tmp_path, [PackFlexCallback()]).fit(Hungry(tiny_model(), SGD), data())
    assert "fewer rows a batch (batch_size)" in error.value.__notes__[0]


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def test_checkpoints_are_written_in_their_own_folder(tmp_path, monkeypatch):
    """Those of callbacks and of signals too: a temporary folder may lie on another disk, or be full."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    saves = ModelCheckpoint(tmp_path / "out", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [saves, SaveOnSignal(tmp_path / "out"), SendSignal(signal.SIGTERM, 1)]
    options = {"max_steps": 4, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    fit = trainer(tmp_path, callbacks, **options)
    fit.fit(CausalLMModule(tiny_model(), SGD), data())
    fit.save_checkpoint(tmp_path / "new" / "last.ckpt")
    assert files_in(tmp_path / "out") == {"step=1.ckpt", "step=2.ckpt", "interrupted.ckpt"}
    assert files_in(tmp_path / "new") == {"last.ckpt"}
    for name, step in {"out/step=1.ckpt": 1, "out/interrupted.ckpt": 2, "new/last.ckpt": 2}.items():
        assert torch.load(tmp_path / name, weights_only=True)["global_step"] == step


def save_in_too_little_room(path, action):
    """In a process of its own: files may have 100 kB there, and what happens to one that grows beyond is `action`."""
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(10**6)}, path)
    except OSError as error:
        raise SystemExit(7 if error.filename == str(path) else 8) from error


@pytest.mark.parametrize(
    ("action", "code", "left"),
    [(signal.SIG_DFL, -signal.SIGXFSZ, {".last.ckpt.partial"}), (signal.SIG_IGN, 7, set())],
    ids=["killed", "disk full"],
)
@pytest.mark.parametrize("there", [True, False], ids=["over an old one", "first"])
def test_a_checkpoint_is_whole_or_not_there(tmp_path, action, code, left, there):
    path = tmp_path / "last.ckpt"
    if there:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(3)}, path)
    process = mp.get_context("fork").Process(target=save_in_too_little_room, args=(path, action))
    process.start()
    process.join()
    assert process.exitcode == code
    assert files_in(tmp_path) == left | ({"last.ckpt"} if there else set())
    if there:
        assert torch.load(path)["weights"].tolist() == [0, 0, 0]
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(2)}, path)
    assert torch.load(path)["weights"].tolist() == [1, 1]
    assert files_in(tmp_path) == {"last.ckpt"}


def test_profile(tmp_path):
    profile = ProfileSteps(tmp_path, skip=1, record=2, rows=5)
    trainer(tmp_path, [profile], max_steps=4).fit(CausalLMModule(tiny_model(), SGD), data())
    table = (tmp_path / "profile.txt").read_text()
    assert "aten::" in table
    assert "Self CPU" in table
    assert (tmp_path / "trace.json").stat().st_size > 1000
    with pytest.raises(ValueError, match="record at least 1; got 1 and 0"):
        ProfileSteps(skip=1, record=0)


def test_profile_of_a_run_that_ends_first(tmp_path):
    profile = ProfileSteps(tmp_path, skip=1, record=20)
    trainer(tmp_path, [profile], max_steps=3).fit(CausalLMModule(tiny_model(), SGD), data())
    assert (tmp_path / "trace.json").is_file()
    late = trainer(tmp_path / "late", [ProfileSteps(tmp_path / "late", skip=3)], max_steps=3)
    with pytest.warns(
        UserWarning, match="recorded nothing: the run ended after 3 batches, and it skips the first 3; set"
    ):
        late.fit(CausalLMModule(tiny_model(), SGD), data())

"""`trainer=fsdp` (FSDP2) on CPUs: a sharded checkpoint of one number of ranks goes on on another."""

import lightning as L
import pytest
import torch

from packflex.models import SetupError
from tests.parallel import scenarios
from tests.parallel.scenarios import STEPS, STOP, checkpoint_of, found, play_all

from _checkpoints import check_checkpoint, check_same_loss, check_same_optimizer, check_sharded  # isort: skip  # scenarios put the recipes on the path

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Whole runs on one and on two ranks, and the rest of each on the other number."""
    place = tmp_path_factory.mktemp("sharded")
    scenarios.make_place(place)
    play_all(place, 1, ["fsdp"], "cpu", 120)
    play_all(place, 2, ["fsdp", "fsdp_from_1", "context_parallel"], "cpu", 120)
    play_all(place, 1, ["fsdp_from_2"], "cpu", 120)
    return place


def test_one_and_two_ranks_have_the_same_losses(place):
    one, two = found(place, 1, "fsdp"), found(place, 2, "fsdp")
    assert one["steps"] == two["steps"] == list(range(STEPS))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["heldout"] == pytest.approx(one["heldout"], rel=1e-4)
    assert abs(one["losses"][0] / one["losses"][-1] - 1) > 0.03, "the weights move, so later losses depend on gradients"


@pytest.mark.parametrize("began", [1, 2])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(place, began):
    assert (checkpoint_of(place, began) / ".metadata").is_file(), "a folder that every rank wrote its part of"
    assert len(torch.load(checkpoint_of(place, began) / "meta.pt")["KeepRandomState"]) == began, "a state for each rank"
    whole, rest = found(place, began, "fsdp"), found(place, 3 - began, f"fsdp_from_{began}")
    assert rest["steps"] == list(range(STOP, STEPS))
    assert rest["losses"] == pytest.approx(whole["losses"][STOP:], rel=1e-4)
    assert rest["heldout"] == pytest.approx(whole["heldout"], rel=1e-4)


def test_nothing_half_written_is_left(place):
    folder = checkpoint_of(place, 2).parent
    assert sorted(entry.name for entry in folder.iterdir()) == ["last.ckpt", "step-3.ckpt", "step-6.ckpt"]


def test_what_a_sharded_checkpoint_is_refused_for(place, tmp_path):
    checkpoint = checkpoint_of(place, 2)
    assert check_checkpoint(str(checkpoint), -1) == STOP
    with pytest.raises(SetupError, match=rf"has done its {STOP} steps, and trainer\.max_steps={STOP - 1}; raise"):
        check_checkpoint(str(checkpoint), STOP - 1)
    one = [torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(one, lr=7.0)
    torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5)
    with pytest.raises(SetupError, match=r"its run had .*optimizer\.lr=\S+, .*and this one has .*optimizer\.lr=7\.0, "):
        check_same_optimizer(str(checkpoint), optimizer)
    with pytest.raises(SetupError, match="written with another optimizer"):
        check_same_optimizer(str(checkpoint), torch.optim.SGD(one, lr=7.0))
    with pytest.raises(SetupError, match=r"had module\.loss_weighting=token, and this one has"):
        check_same_loss(str(checkpoint), "document")
    alone = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=1)
    with pytest.raises(SetupError, match="a sharded checkpoint, which only trainer=fsdp goes on from"):
        check_sharded(str(checkpoint), alone)


def test_context_parallel_logits_and_gradients(place):
    errors = found(place, 2, "context_parallel")
    assert errors["moves"], "nothing would be exchanged otherwise"
    assert max(errors[name] for name in ("logits", "loss", "gradients")) < 1e-5

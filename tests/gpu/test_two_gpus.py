"""Two GPUs: the same losses as one, sharded checkpoints that go on on either, and rows that two GPUs share."""

import importlib.util

import pytest
import torch

from packflex.integrations.lightning.module import _linear_loss
from packflex.losses import next_token_loss
from packflex.testing.tolerances import relative_error
from tests.parallel import scenarios
from tests.parallel.scenarios import STEPS, STOP, checkpoint_of, found, play_all

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Everything is played first: starting processes takes longer than what they do."""
    place = tmp_path_factory.mktemp("two_gpus")
    scenarios.make_place(place)
    play_all(place, 1, ["losses", "fsdp"], "cuda", 90)
    play_all(place, 2, ["context_parallel", "losses", "uneven", "fsdp", "fsdp_from_1"], "cuda", 100)
    play_all(place, 1, ["fsdp_from_2"], "cuda", 60)
    return place


@two_gpus
def test_ddp_has_the_losses_of_one_gpu_at_the_same_global_batch(place):
    one, two = found(place, 1, "losses"), found(place, 2, "losses")
    assert len(one) == len(two) == 6
    assert two == pytest.approx(one, rel=1e-4)
    assert one[0] != pytest.approx(one[-1], rel=1e-3), "the weights move, so later losses depend on gradients"


@two_gpus
def test_two_gpus_end_together_when_rows_do_not_divide(place):
    first, second = found(place, 2, "uneven")
    assert first == second
    assert first[0] == 6
    assert all(0 < loss < 10 for loss in first[1])


@two_gpus
def test_two_gpus_that_share_rows_equal_one(place):
    errors = found(place, 2, "context_parallel")
    assert errors["moves"], "nothing would be exchanged otherwise"
    assert max(errors[name] for name in ("logits", "loss", "gradients")) < 1e-4, errors


@two_gpus
def test_fsdp_has_the_losses_of_one_gpu_at_the_same_global_batch(place):
    """In bf16, whose rounding differs with the rows of a batch."""
    one, two = found(place, 1, "fsdp"), found(place, 2, "fsdp")
    assert one["steps"] == two["steps"] == list(range(STEPS))
    assert two["losses"] == pytest.approx(one["losses"], rel=3e-3)
    assert abs(one["losses"][0] / one["losses"][-1] - 1) > 0.03, "the weights move, so later losses depend on gradients"


@two_gpus
@pytest.mark.parametrize("began", [1, 2])
def test_a_sharded_checkpoint_goes_on_on_another_number_of_gpus(place, began):
    assert (checkpoint_of(place, began) / ".metadata").is_file(), "a folder that every rank wrote its part of"
    whole, rest = found(place, began, "fsdp"), found(place, 3 - began, f"fsdp_from_{began}")
    assert rest["steps"] == list(range(STOP, STEPS))
    assert rest["losses"] == pytest.approx(whole["losses"][STOP:], rel=3e-3)
    assert rest["heldout"] == pytest.approx(whole["heldout"], rel=3e-3)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_liger_loss_equals_that_of_the_logits(dtype, softcap):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(2, 300, 64, device="cuda", dtype=dtype, generator=generator)
    weight = torch.randn(1000, 64, device="cuda", dtype=dtype, generator=generator) * 0.2
    labels = torch.randint(0, 1000, (2, 300), device="cuda", generator=generator)
    labels[labels % 4 == 0] = -100

    def plain(hidden, weight):
        logits = hidden.double() @ weight.double().T
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return next_token_loss(logits, labels)

    liger = _linear_loss("liger", "token")
    results = []
    for loss in (plain, lambda h, w: liger(h, w, labels, None, bias=None, softcap=softcap)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        total, count = loss(*leaves)
        results.append((total, count, torch.autograd.grad(total / count, leaves)))
    (total, count, grads), (ours, our_count, our_grads) = results
    assert our_count == count > 100
    tolerance = 1e-4 if dtype == torch.float32 else 1.2e-2
    assert relative_error(ours, total) < tolerance
    for a, b in zip(our_grads, grads, strict=True):
        assert relative_error(a, b) < tolerance

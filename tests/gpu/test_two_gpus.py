"""Two GPUs: the same losses as one, sharded checkpoints that go on on either, and rows that two GPUs share."""

import importlib.util

import pytest
import torch

from packflex.integrations.lightning.module import _linear_loss
from packflex.losses import next_token_loss
from packflex.testing.ranks import run_ranks
from packflex.testing.tolerances import relative_error
from tests.parallel import scenarios
from tests.parallel.scenarios import STEPS, STOP, checkpoint_of, found, play

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("two_gpus")


@pytest.fixture(scope="module")
def compared(place):
    """DDP and context parallelism, what is compared within the ranks' own processes."""
    run_ranks(play, 1, ["losses"], 1, "cuda", place, device="cuda", timeout=90)
    run_ranks(play, 2, ["context_parallel", "losses", "uneven"], 2, "cuda", place, device="cuda", timeout=120)
    return place


@pytest.fixture(scope="module")
def sharded(place):
    """Whole runs of `trainer=fsdp` on one and on two GPUs, and the rest of each on the other number."""
    scenarios.make_place(place)
    run_ranks(play, 1, ["fsdp"], 1, "cuda", place, device="cuda", timeout=90)
    run_ranks(play, 2, ["fsdp", "fsdp_from_1"], 2, "cuda", place, device="cuda", timeout=120)
    run_ranks(play, 1, ["fsdp_from_2"], 1, "cuda", place, device="cuda", timeout=90)
    return place


@two_gpus
def test_ddp_has_the_losses_of_one_gpu_at_the_same_global_batch(compared):
    one, two = found(compared, 1, "losses"), found(compared, 2, "losses")
    assert len(one) == len(two) == 6
    assert two == pytest.approx(one, rel=1e-4)
    assert one[0] != pytest.approx(one[-1], rel=1e-3), "the weights move, so later losses depend on gradients"


@two_gpus
def test_two_gpus_end_together_when_rows_do_not_divide(compared):
    first, second = found(compared, 2, "uneven")
    assert first == second
    assert first[0] == 6
    assert all(0 < loss < 10 for loss in first[1])


@two_gpus
def test_two_gpus_that_share_rows_equal_one(compared):
    errors = found(compared, 2, "context_parallel")
    assert errors["moves"], "nothing would be exchanged otherwise"
    assert max(errors[name] for name in ("logits", "loss", "gradients")) < 1e-4, errors


@two_gpus
def test_fsdp_has_the_losses_of_one_gpu_at_the_same_global_batch(sharded):
    """In bf16, whose rounding differs with the rows of a batch."""
    one, two = found(sharded, 1, "fsdp"), found(sharded, 2, "fsdp")
    assert one["steps"] == two["steps"] == list(range(STEPS))
    assert two["losses"] == pytest.approx(one["losses"], rel=3e-3)
    assert min(abs(a / b - 1) for a, b in zip(one["losses"], one["losses"][1:], strict=False)) > 3e-3, "weights move"


@two_gpus
@pytest.mark.parametrize("began", [1, 2])
def test_a_sharded_checkpoint_goes_on_on_another_number_of_gpus(sharded, began):
    assert (checkpoint_of(sharded, began) / ".metadata").is_file(), "a folder that every rank wrote its part of"
    whole, rest = found(sharded, began, "fsdp"), found(sharded, 3 - began, f"fsdp_from_{began}")
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

"""Two and three processes that share packed rows give the logits and gradients of one."""

import functools
import logging

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from packflex import PackedLayout
from packflex.integrations.lightning import (
    CausalLMModule,
    ContextParallel,
    PackedDataModule,
    PackFlexCallback,
)
from packflex.integrations.transformers import enable_packflex
from packflex.losses import next_token_loss, token_weights
from packflex.parallel.layout import ShardedLayout, shard_batch
from packflex.testing.families import FAMILIES, VOCAB, tiny_model
from tests.integrations.test_lightning import SEQ_LEN, SGD, SaveGradients, packed_rows, trainer
from tests.integrations.test_lightning import pytestmark as quiet
from tests.integrations.test_lightning import tiny_model as lightning_model

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = [*quiet, pytest.mark.slow]
LENGTHS = ((150, 20, 3), (40, 1, 60, 33))


def batch_of():
    layout = PackedLayout.from_lengths(LENGTHS, 176)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (2, 176), generator=generator) * (layout.document_ids >= 0)
    labels = ids.masked_fill((layout.position_ids == 0) | (layout.document_ids < 0) | (ids % 5 == 0), -100)
    return {"input_ids": ids, "labels": labels, "position_ids": layout.position_ids, "packed": layout}


def loss_and_gradients(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    total, count = next_token_loss(model(**inputs).logits, batch["labels"])
    return total.detach(), count, torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


def work(rank, ranks, family, checkpointing, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    model = tiny_model(family).train()
    enable_packflex(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = shard_batch(batch_of(), ranks, rank)
    batch["packed"].group = dist.group.WORLD
    total, count, grads = loss_and_gradients(model, batch)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads, strict=True)]
    for tensor in (total, count, *grads):
        dist.all_reduce(tensor)
    if rank == 0:
        torch.save([total, count, grads], f"{folder}/result.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "ranks", "checkpointing"),
    [("llama", 3, True), *((family, 2, False) for family in FAMILIES)],
)
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning", "ignore::FutureWarning")
def test_ranks_together_equal_one(tmp_path, family, ranks, checkpointing):
    """Full and sliding layers, softcap, sinks, gradient checkpointing; a document of 150 tokens is split."""
    mp.start_processes(work, (ranks, family, checkpointing, tmp_path), ranks, start_method="fork")
    total, count, grads = torch.load(tmp_path / "result.pt")
    model = tiny_model(family).train()
    enable_packflex(model)
    expected_total, expected_count, expected = loss_and_gradients(model, batch_of())
    assert count == expected_count > 0
    assert total.item() == pytest.approx(expected_total.item(), rel=1e-5)
    for ours, exact, (name, p) in zip(grads, expected, model.named_parameters(), strict=True):
        exact = torch.zeros_like(p) if exact is None else exact
        assert torch.allclose(ours, exact, rtol=1e-3, atol=1e-4), name
    layout = ShardedLayout([n for row in LENGTHS for n in row], 352, ranks, 0)
    assert layout.exchange().moves, "the test would pass without any exchange otherwise"


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_lightning_trains_as_one_rank_does(tmp_path):
    """Two ranks share each batch of two rows: the gradient of the step is that of one process with the same rows."""
    rows = packed_rows()
    options = {"max_steps": 2, "logger": False}
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    data = functools.partial(PackedDataModule, rows, rows.select(range(3)), seq_len=SEQ_LEN, batch_size=2, seed=3)
    trainer(tmp_path, [PackFlexCallback(), SaveGradients(one)], **options).fit(
        CausalLMModule(lightning_model(), SGD), data()
    )
    shared = trainer(
        tmp_path,
        [PackFlexCallback(), ContextParallel(2), SaveGradients(two)],
        devices=2,
        strategy="ddp_fork",
        **options,
    )
    shared.fit(CausalLMModule(lightning_model(), SGD), data(context_parallel_size=2))
    alone, together = torch.load(one), torch.load(two)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for a, b in zip(alone["gradients"], together["gradients"], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_shared():
    batch = shard_batch(batch_of(), 2, 0)
    model = tiny_model("llama")
    enable_packflex(model)
    with pytest.raises(ValueError, match="the layout has no process group"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], packed=batch["packed"])
    with pytest.raises(ValueError, match="a sharded batch needs its position_ids"):
        model(input_ids=batch["input_ids"], packed=batch["packed"])
    with pytest.raises(ValueError, match='context parallelism splits them over ranks; use "token"'):
        token_weights(batch["labels"], batch["packed"], "document")
    with pytest.raises(ValueError, match="rank must be from 0 to 1; got 2"):
        ShardedLayout([4], 8, 2, 2)
    with pytest.raises(ValueError, match="at least 2 ranks that share a batch; got 1"):
        ContextParallel(1)
    data = PackedDataModule(packed_rows(), seq_len=SEQ_LEN, batch_size=1, context_parallel_size=2)
    with pytest.raises(ValueError, match="context_parallel_size=2 must divide the number of ranks, 1"):
        L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=1).fit(
            CausalLMModule(lightning_model(), SGD), data
        )

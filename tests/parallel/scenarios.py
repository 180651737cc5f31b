"""What one and two ranks are compared on, on CPUs (`test_sharded.py`) and on GPUs (`tests/gpu/test_two_gpus.py`)."""

import functools
import json
import logging
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM

from packflex import PackedLayout
from packflex.data.tokenizer import train_tokenizer
from packflex.integrations.lightning import CausalLMModule, PackedDataModule, PackFlexCallback
from packflex.integrations.transformers import enable_packflex
from packflex.losses import next_token_loss
from packflex.models import build_model
from packflex.parallel.layout import shard_batch
from packflex.report import read_metrics
from packflex.testing.ranks import run_ranks
from packflex.testing.tolerances import relative_error
from tests.integrations.test_lightning import SEQ_LEN, CountSteps, packed_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import finetune as recipe  # noqa: E402

STEPS, STOP = 6, 3  # of the recipe's runs, and where the checkpoint is that others go on from
GLOBAL_BATCH = 4
LONG, SHORT = 150, (20, 3, 40, 1, 60, 33)


def small_model(dtype=torch.float32):
    """Large enough for every kernel: 16 numbers a head."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **heads)
    return LlamaForCausalLM(config).to(dtype)


def make_place(place):
    """train.jsonl and a tiny pretrained model, for the recipe."""
    sums = [(a, b) for a in range(9) for b in range(7)]
    records = [{"prompt": f"What is {a} plus {b}?\n", "completion": f"It is {a + b}."} for a, b in sums]
    (place / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = train_tokenizer([r["prompt"] + r["completion"] for r in records], 300, place / "cache")
    tokenizer.save_pretrained(place / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    build_model(architecture={"model_type": "llama", "vocab_size": None} | sizes, tokenizer=tokenizer).save_pretrained(
        place / "model"
    )


def play(rank, names, ranks, device, place):
    """Every scenario in turn; what the first rank found goes to `place/<ranks>-<name>.pt`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # the tests that play in one process hold warnings to account
    for name in names:
        found = SCENARIOS[name](rank, ranks, device, place)
        if rank == 0:
            torch.save(found, place / f"{ranks}-{name}.pt")


def play_all(place, ranks, names, device, timeout):
    """Play in as few processes as there can be: those after a scenario that fails start anew."""
    names = list(names)
    while names:
        try:
            run_ranks(play, ranks, names, ranks, device, place, device=device, timeout=timeout)
            return
        except (TimeoutError, mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            failed = next((name for name in names if not (place / f"{ranks}-{name}.pt").exists()), names[-1])
            (place / f"{ranks}-{failed}.error").write_text(str(error))
            names = names[names.index(failed) + 1 :]


def found(place, ranks, name):
    """What a scenario found, or a failure with what it died of."""
    if not (path := place / f"{ranks}-{name}.pt").exists():
        error = path.with_suffix(".error")
        pytest.fail(error.read_text() if error.exists() else f"{name} on {ranks} ranks was not played", pytrace=False)
    return torch.load(path)


def losses(rank, ranks, device, place):
    """Six steps of four rows: on one rank batches of four, on two ranks batches of two."""
    data = PackedDataModule(packed_rows(), seq_len=SEQ_LEN, batch_size=GLOBAL_BATCH // ranks, seed=7)
    return _fitted(ranks, device, place / f"losses-{ranks}", data, max_steps=6)[0][1]


def uneven(rank, ranks, device, place):
    """Seven rows, two a rank and batch, three epochs: steps and losses of each rank."""
    data = PackedDataModule(packed_rows().select(range(7)), seq_len=SEQ_LEN, batch_size=2)
    return _fitted(ranks, device, place / f"uneven-{ranks}", data, max_steps=-1, max_epochs=3)


def _fitted(ranks, device, folder, data, **limits):
    folder.mkdir(exist_ok=True)
    trainer = L.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=ranks,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[PackFlexCallback(), CountSteps(folder)],
        **limits,
    )
    trainer.fit(CausalLMModule(small_model(), functools.partial(torch.optim.SGD, lr=0.1)), data)
    dist.barrier()
    return [torch.load(folder / f"rank{r}.pt") for r in range(ranks)]


def fsdp(rank, ranks, device, place):
    """The recipe with `trainer=fsdp`, from start to end, with a sharded checkpoint half-way."""
    return _sharded_run(ranks, device, place, place / f"fsdp-{ranks}")


def fsdp_from_1(rank, ranks, device, place):
    """The second half of the run that one rank began."""
    return _sharded_run(ranks, device, place, place / f"rest-{ranks}-of-1", checkpoint_of(place, 1))


def fsdp_from_2(rank, ranks, device, place):
    """The second half of the run that two ranks began."""
    return _sharded_run(ranks, device, place, place / f"rest-{ranks}-of-2", checkpoint_of(place, 2))


def checkpoint_of(place, ranks):
    return place / f"fsdp-{ranks}" / "checkpoints" / f"step-{STOP}.ckpt"


def _sharded_run(ranks, device, place, out, checkpoint=None):
    settings = [
        "data=jsonl", f"data.path={place}/train.jsonl", f"model.path={place}/model", "callbacks=quiet",
        "packing.seq_len=64", f"packing.batch_size={GLOBAL_BATCH // ranks}", "heldout.limit=4",
        "sample.max_new_tokens=4",
        "trainer=fsdp", f"trainer.devices={ranks}", f"trainer.max_steps={STEPS}", "trainer.max_epochs=null",
        "trainer.log_every_n_steps=1", "optimizer.lr=5e-3", f"callbacks.checkpoint.every_n_train_steps={STOP}",
        "callbacks.checkpoint.save_top_k=-1", f"paths.output_dir={out}", f"paths.cache_dir={place}/cache",
    ]  # fmt: skip
    if device == "cpu":
        settings += ["trainer.accelerator=cpu", "trainer.precision=32-true"]
    if checkpoint is not None:
        settings.append(f"ckpt_path={checkpoint}")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("finetune", overrides=settings)
    summary = recipe.finetune(config)
    dist.barrier()
    steps, curve = read_metrics(out / "metrics.csv", "train/loss")
    return {"steps": steps, "losses": curve, "heldout": summary.loss_end}


def context_parallel(rank, ranks, device, place):
    """Relative errors of logits and gradients of ranks that share a batch, against the batch in one piece."""
    lengths = ((LONG, *SHORT[:2]), SHORT[2:])
    layout = PackedLayout.from_lengths(lengths, 176)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (2, 176), generator=generator) * (layout.document_ids >= 0)
    labels = ids.masked_fill((layout.position_ids == 0) | (layout.document_ids < 0) | (ids % 5 == 0), -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": layout.position_ids, "packed": layout}
    model = small_model().to(device).train()
    enable_packflex(model)
    whole, whole_loss, whole_grads = _run(model, batch, device)
    mine = shard_batch(batch, ranks, rank)
    mine["packed"].group = dist.group.WORLD
    logits, loss, grads = _run(model, mine, device)
    for tensor in (loss, *grads):
        dist.all_reduce(tensor)
    documents = whole[layout.document_ids.to(device) >= 0].split([n for row in lengths for n in row])
    expected = torch.cat([documents[p.document][p.start : p.end] for p in mine["packed"].mine])
    error = torch.tensor(relative_error(logits[0, : len(expected)], expected), device=device)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return {
        "logits": error.item(),
        "loss": relative_error(loss, whole_loss),
        "gradients": max(relative_error(a, b) for a, b in zip(grads, whole_grads, strict=True)),
        "moves": mine["packed"].exchange().moves,
    }


def _run(model, batch, device):
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    total, _ = next_token_loss(logits, batch["labels"].to(device))
    return logits.detach(), total.detach(), torch.autograd.grad(total, list(model.parameters()))


SCENARIOS = {
    "losses": losses,
    "uneven": uneven,
    "fsdp": fsdp,
    "fsdp_from_1": fsdp_from_1,
    "fsdp_from_2": fsdp_from_2,
    "context_parallel": context_parallel,
}

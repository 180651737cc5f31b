"""Fine-tune a causal language model on packed documents.

    python recipes/finetune.py                                    # a small model on this Python's own library, CPU
    python recipes/finetune.py data=jsonl data.path=train.jsonl model.path=./my-model trainer=gpu packing.seq_len=8192

Everything is a Hydra setting; conf/finetune.yaml lists them. Wrong input is one line on stderr and exit code 2
(`debug=true` shows where it comes from).
"""

from __future__ import annotations

import os

# Threads that wait for one another sleep instead of spinning: with another process on the same cores, the default run
# was 8 times slower without this. OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import logging
import math
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import datasets
import hydra
import lightning as L
from _checkpoints import check_checkpoint, check_same_loss, check_same_model, check_same_optimizer, check_sharded
from _checks import (
    check_attention,
    check_monitors,
    check_settings,
    check_sharing,
    check_single_run,
    check_stream,
    fill_in,
    stream_settings,
    tried,
)
from _cluster import check_processes, join_ranks
from _command import USER_ERRORS, run_command, stop
from _data import DocumentNames, PackedSplits, is_stream, prepare, say
from _errors import is_lost_rank, missing_metric, unwritten
from _sharding import ShardedCausalLMModule, whole_state
from _signals import StopSignals
from datasets import Dataset
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from packflex.data.tokenized_stream import TokenizedStream
from packflex.integrations.lightning import (
    ContextParallel,
    NonFiniteLossError,
    NonFiniteLossGuard,
    PackedDataModule,
    SaveOnSignal,
    StreamDataModule,
    continue_metrics,
    is_out_of_memory,
)
from packflex.integrations.lightning.shapes import token_cost
from packflex.models import SetupError, add_adapters, check_adapters, merge_adapters
from packflex.report import (
    RunSummary,
    complete,
    prompt_of,
    read_metrics,
    save_loss_picture,
    shortest,
    typical_document,
    typical_speed,
)
from packflex.report_page import save_report

# What Lightning and peft warn of that is meant here: no workers for rows in memory, metrics.csv beside Hydra's own
# files, a resumed run that writes to a folder of its own, no held-out documents, embeddings that adapters wrap in
# adapter/.
EXPECTED = (
    "does not have many workers",
    "Experiment logs directory",
    "isinstance.treespec, LeafSpec",
    "Checkpoint dir",
    "The dirpath has changed",
    "You defined a `validation_step` but have no",
    "Setting .save_embedding_layers. to .True. as embedding layers found",
)


def finetune(config: DictConfig) -> RunSummary:
    """Run a config: pack, measure, train, measure again, save."""
    with StopSignals() as signals:
        return _finetune(config, signals)


def _finetune(config: DictConfig, signals: StopSignals) -> RunSummary:
    check_settings(config)
    join_ranks(config)
    first_step = check_checkpoint(config.ckpt_path, config.trainer.max_steps)
    check_same_loss(config.ckpt_path, config.module.loss_weighting)
    L.seed_everything(config.seed, verbose=False)
    callbacks = [signals, *(instantiate(c) for c in config.callbacks.values() if c)]
    loggers = [instantiate(c) for c in config.logger.values() if c]
    sharing = config.trainer.context_parallel_size
    if is_stream(config):
        check_stream(config)
        config.trainer.max_epochs = -1  # as many passes as the steps take
    if sharing > 1:
        callbacks.insert(0, ContextParallel(sharing))
    trainer: L.Trainer = instantiate(
        lightning_settings(config.trainer),
        callbacks=callbacks,
        logger=loggers,
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),  # else Lightning adds one of its own
    )
    check_processes(config, trainer)
    check_single_run(trainer)
    check_sharded(config.ckpt_path, trainer)
    check_sharing(config, trainer)
    check_attention(config, callbacks)
    check_monitors(config, callbacks)

    adapters = instantiate(config.peft) if config.peft._target_ is not None else None
    if adapters is not None:
        check_adapters(adapters)

    data = prepare(config)
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    model = instantiate(config.model, tokenizer=data.tokenizer)
    say("%s with %.1f million parameters", type(model).__name__, model.num_parameters() / 1e6)
    if adapters is not None:
        if sharded:
            raise SetupError("adapters are not trained sharded: use trainer=ddp with peft=lora, or peft=none")
        model = add_adapters(model, adapters, config.seed)
        say("Training %.1f million of them in adapters", model.num_parameters(only_trainable=True) / 1e6)
    streaming = isinstance(data.train, TokenizedStream)
    fill_in(config, trainer, None if streaming else len(data.train))
    make_module = ShardedCausalLMModule if sharded else hydra.utils.get_class(config.module._target_)
    options = {str(key): value for key, value in config.module.items() if key != "_target_"}
    make_optimizer, make_scheduler = instantiate(config.optimizer), instantiate(config.scheduler)
    module = make_module(model, make_optimizer, make_scheduler, **options)
    check_same_model(config.ckpt_path, module)
    optimizer = tried("optimizer", make_optimizer, [p for p in module.parameters() if p.requires_grad])
    tried("scheduler", make_scheduler, optimizer)
    check_same_optimizer(config.ckpt_path, optimizer)
    pad = 0 if data.tokenizer.pad_token_id is None else data.tokenizer.pad_token_id
    rows: PackedDataModule | StreamDataModule
    if streaming:
        rows = StreamDataModule(
            data.train, data.heldout, pad_token_id=pad, **stream_settings(config, trainer.accumulate_grad_batches)
        )
    else:
        rows = instantiate(config.datamodule)(data.train, data.heldout, pad_token_id=pad, token_cost=token_cost(model))

    resume: dict[str, Any] = {"ckpt_path": config.ckpt_path, "weights_only": True if config.ckpt_path else None}
    if config.ckpt_path is None:
        before = _heldout_loss(trainer, module, rows)
    else:
        trainer.loggers = []  # Lightning does not know the step yet
        before = _heldout_loss(trainer, module, rows, **resume)
        trainer.loggers = loggers
        _go_on_logging(trainer, first_step, before)
    if not _is_finite(before):
        raise NonFiniteLossError(
            f"the held-out loss is {before} before training: the weights that it starts from or a held-out document "
            "are broken; give another checkpoint or model (ckpt_path=..., model.path=...), or hold other documents out"
        )
    for guard in (c for c in callbacks if isinstance(c, NonFiniteLossGuard)):
        guard.name_document = DocumentNames(data)
    trainer.fit(module, rows, **resume)
    steps = trainer.global_step
    for stopper in (c for c in callbacks if isinstance(c, SaveOnSignal) and c.caught is not None):
        if stopper.checkpoint is not None:
            _interrupted(stopper, steps)
        say("\n%s came during the last of %s steps, so the run ends as usual", stopper.caught.name, steps)
    if config.ckpt_path is not None and steps == first_step:  # of a run that was over, and whose model is wanted
        checkpoint, after = Path(config.ckpt_path), before
        signals.trained(checkpoint)
    else:
        checkpoint = Path(config.paths.output_dir) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(checkpoint)
        signals.trained(checkpoint)
        after = _heldout_loss(trainer, module, rows)
        if not _is_finite(after):
            aside = shortest(_set_aside(trainer, checkpoint))
            raise NonFiniteLossError(
                f"the held-out loss is {after} after {steps} steps, whose checkpoint is {aside}; go on from one before"
            )
    count = len(data.train) if isinstance(data.train, Dataset) else 0
    if isinstance(rows, StreamDataModule) and rows.stream is not None:
        seen = rows.stream.report()
        count = seen["rows"]
        full = seen["tokens"] / max(1, seen["rows"] * config.packing.seq_len)
        notes = data.notes
        if seen["passes"] > 1:
            notes += (f"documents and rows are counted in each of {seen['passes']} passes over the stream",)
        data = dataclasses.replace(data, num_documents=seen["documents"], efficiency=full, notes=notes)
    return _finish(config, trainer, model, data, count, [(first_step, before), (steps, after)], checkpoint)


def lightning_settings(trainer: DictConfig) -> DictConfig:
    """What Lightning's own trainer takes of the `trainer` group."""
    settings: Any = OmegaConf.to_container(trainer, resolve=True)
    del settings["context_parallel_size"]
    return OmegaConf.create(settings)


def _interrupted(stopper: SaveOnSignal, step: int) -> NoReturn:
    """Say how to go on, and exit as a process that a signal ended does."""
    assert stopper.caught is not None
    assert stopper.checkpoint is not None
    path = shortest(stopper.checkpoint)
    say("\nStopped by %s after %s steps. Go on with the same command and ckpt_path=%s", stopper.caught.name, step, path)
    sys.exit(128 + stopper.caught)


def _heldout_loss(
    trainer: L.Trainer, module: L.LightningModule, rows: L.LightningDataModule, **resume: Any
) -> float | None:
    """Loss on the held-out documents, None without any."""
    if rows.heldout is None:
        return None
    return trainer.validate(module, rows, verbose=False, **resume)[0]["val/loss"]


def _is_finite(loss: float | None) -> bool:
    return loss is None or math.isfinite(loss)


def _set_aside(trainer: L.Trainer, checkpoint: Path) -> Path:
    """Take a checkpoint of weights that cannot be used from the name that good ones have."""
    aside = checkpoint.with_name("nonfinite.ckpt")
    if trainer.is_global_zero:
        if aside.is_dir():
            shutil.rmtree(aside)
        checkpoint.replace(aside)
    return aside


def _go_on_logging(trainer: L.Trainer, step: int, heldout: float | None) -> None:
    """Keep what an earlier part of the run logged in this folder."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            continue_metrics(logger, step)
        if heldout is not None:
            logger.log_metrics({"val/loss": heldout}, step)


def _finish(
    config: DictConfig,
    trainer: L.Trainer,
    model: PreTrainedModel,
    data: PackedSplits,
    rows: int,
    losses: list[tuple[int, float | None]],
    checkpoint: Path,
) -> RunSummary:
    """Save the model and the pictures, and sum the run up. Every rank takes part: weights may be shared out."""
    out = Path(config.paths.output_dir)
    model.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU, and shards are gathered on their devices
    files = {"checkpoint": checkpoint, "model": out / "model", "config": out / "config.yaml"}
    if config.peft._target_ is not None:
        files["adapter"] = out / "adapter"
        if trainer.is_global_zero:
            model.save_pretrained(files["adapter"])
        model, untied = merge_adapters(model)
        if untied:
            say("The adapters changed a weight that embedding and output share: model/ has one for each")
    state = whole_state(model)
    measured = [(step, loss) for step, loss in losses if loss is not None]
    earlier = zip(*read_metrics(out / "metrics.csv", "val/loss"), strict=True)
    measured = [(step, loss) for step, loss in earlier if step < losses[0][0]] + measured
    files["report"] = out / "report.html"
    if trainer.is_global_zero:
        model.save_pretrained(files["model"], state_dict=state)
        data.tokenizer.save_pretrained(files["model"])
        OmegaConf.save(config, files["config"], resolve=True)
    held = data.heldout_documents
    probe = typical_document(held if held is not None else data.train_documents)
    prompt, completion = complete(
        model, data.tokenizer, prompt_of(probe["input_ids"], probe["labels"]), **config.sample
    )
    if trainer.is_global_zero:
        metrics, picture = out / "metrics.csv", out / "loss.png"
        if save_loss_picture(metrics, picture, measured):
            files |= {"metrics": metrics} if metrics.is_file() else {}
            files["loss curve"] = picture
    summary = RunSummary(
        parameters=sum(p.numel() for p in model.parameters()),
        documents=data.num_documents,
        rows=rows,
        seq_len=config.packing.seq_len,
        efficiency=data.efficiency,
        steps=losses[-1][0],
        tokens_per_second=typical_speed(out / "metrics.csv"),
        loss_start=losses[0][1],
        loss_end=losses[-1][1],
        heldout_documents=0 if held is None else len(held),
        prompt=prompt,
        completion=completion,
        notes=data.notes,
        files={name: shortest(path) for name, path in files.items()},
    )
    if trainer.is_global_zero:
        summary.save(out / "summary.json")
        save_report(
            summary, out / "metrics.csv", out / "report.html", OmegaConf.to_yaml(config, resolve=True), measured
        )
        print(f"\n{summary}")
    return summary


@hydra.main(version_base="1.3", config_path="../conf", config_name="finetune")
def run(config: DictConfig) -> None:
    """The run itself, with its config composed by Hydra from the command line."""
    run_config(config)


def run_config(config: DictConfig) -> None:
    """Run a composed config as a command does: quiet libraries, one line for a user's mistake."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", f".*{message}")
    for name in ("huggingface_hub", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()  # of transformers, for reading and writing weights
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        finetune(config)
    except USER_ERRORS as error:  # here and not in main: Hydra would announce it with a line of its own
        stop(error)
    except OSError as error:
        stop(unwritten(error))
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):  # of the host; a GPU's is a type of its own
            stop(error)
        missing = missing_metric(error)
        if missing is not None:
            stop(missing)
        if not is_lost_rank(error):
            raise
        stop(
            SetupError(
                "another rank of this run has died: it says why above, or was killed. Go on from the last checkpoint: "
                f"ckpt_path={shortest(Path(config.paths.output_dir) / 'checkpoints')}/..."
            )
        )


if __name__ == "__main__":
    run_command(run)

"""Checks before a run starts, and values that depend on one another."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, get_args

import lightning as L
import torch
from _booleans import check_booleans
from _checkpoints import progress
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf

from packflex.attention.api import BACKENDS
from packflex.data.chat import Turns
from packflex.data.loader import ORDERS
from packflex.data.tokenize import OnUnsupervised
from packflex.data.tokenized_stream import KINDS
from packflex.integrations.lightning import callback, module
from packflex.integrations.lightning.resume import steps_to_come
from packflex.losses import WEIGHTINGS
from packflex.models import SetupError, checked_name, is_pretrained
from packflex.packing.strategies import OVERFLOWS, STRATEGIES
from packflex.report import complete

# Least value of settings that are whole numbers, and whether null is one of their values.
_WHOLE_NUMBERS = {
    "seed": (0, False),
    "packing.seq_len": (2, False),
    "packing.batch_size": (1, False),
    "packing.num_workers": (0, False),
    "data.limit": (1, True),
    "heldout.limit": (1, True),
    "tokenize.max_length": (2, True),
    "tokenize.num_proc": (1, True),
    "tokenizer.vocab_size": (259, False),
    "trainer.max_steps": (-1, False),
    "trainer.max_epochs": (-1, True),
    "trainer.accumulate_grad_batches": (1, False),
    "packing.pool": (1, False),
    "trainer.context_parallel_size": (1, False),
    "steps.total": (1, True),
    "steps.warmup": (0, True),
    "sample.max_new_tokens": (1, False),
}
# Least and greatest value of other numbers, and whether the greatest is one of them. Null is taken as 0, but for
# steps.warmup_share, which is not read where steps.warmup is set.
_NUMBERS = {
    "heldout.percent": (0, 100, False),
    "steps.warmup_share": (0, 1, True),
    "sample.temperature": (0, math.inf, False),
}
# The values of settings that are one of a few words.
_WORDS: dict[str, Sequence[str]] = {
    "tokenize.turns": get_args(Turns),
    "tokenize.on_unsupervised": get_args(OnUnsupervised),
    "packing.strategy": tuple(STRATEGIES),
    "packing.overflow": OVERFLOWS,
    "packing.order": ORDERS,
    "module.loss_weighting": WEIGHTINGS,
    "module.loss": module.LOSSES,
}
# Groups whose settings are handed on when the run has got there, outside Hydra's own instantiation.
_HANDED_ON = ("data", "tokenize", "optimizer", "scheduler", "module", "datamodule")


def check_settings(config: DictConfig) -> None:
    """Refuse settings that cannot work, before the data is read.

    Raises:
        SetupError: a mandatory value that is not set, a number that is none or too small, no such model folder,
            backend or GPU.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise SetupError(f"{missing[0]} is not set; give it on the command line: {missing[0]}=...")
    check_booleans(config)
    check_options(config, _HANDED_ON)
    _check_known("sample", complete, config.sample)
    for name, (least, nullable) in _WHOLE_NUMBERS.items():
        if OmegaConf.select(config, name) is not None or not nullable:
            check_whole_number(config, name, least)
    check_words(config)
    for name, (low, high, both) in _NUMBERS.items():
        value = OmegaConf.select(config, name)
        if value is None and (name != "steps.warmup_share" or config.steps.warmup is not None):
            continue
        if not _is_number(value) or not (low <= value < high or (both and value == high)):
            top = "" if math.isinf(high) else f" to {high}" if both else f" to below {high}"
            raise SetupError(f"{name}={value} must be a number from {low}{top or ' upwards'}")
    rates = {"optimizer.lr": config.optimizer.lr} | {f"learning_rate.{k}": v for k, v in config.learning_rate.items()}
    for name, value in rates.items():
        if value is not None and not (_is_number(value) and value > 0):
            raise SetupError(f"{name}={value} must be a number above 0")
    for name in ("max_steps", "max_epochs"):
        if config.trainer[name] == 0:
            raise SetupError(f"trainer.{name}=0 trains nothing; set it above 0, or to -1 where the other ends the run")
    _check_validations(config.trainer)
    limit, overfit = (config.trainer.get(name) for name in ("limit_train_batches", "overfit_batches"))
    limited = limit is not None and not (limit == 1 and isinstance(limit, float))  # 1 is one batch, 1.0 all of them
    for name, value, cuts in (("limit_train_batches", limit, limited), ("overfit_batches", overfit, bool(overfit))):
        if cuts:
            raise SetupError(
                f"trainer.{name}={value} cuts epochs short, and the schedule and resumed runs count whole ones; take "
                "fewer documents (data.limit=...) or fewer steps (trainer.max_steps=...)"
            )
    if config.trainer.limit_val_batches == 0 and _holds_out(config.heldout):
        raise SetupError("trainer.limit_val_batches=0 measures no held-out loss; hold no documents out instead "
                         "(heldout.percent=0 heldout.path=null heldout.split=null)")  # fmt: skip
    clip = config.trainer.gradient_clip_val
    if clip is not None and not (_is_number(clip) and clip >= 0):  # NaN is not
        raise SetupError(f"trainer.gradient_clip_val={clip} must be a number of at least 0; 0 or null clips nothing")
    is_pretrained(config.model.path, config.model.init)
    if config.model.path is not None:
        checked_name(config.model.path)
    _check_devices(config.trainer)
    if config.module.loss == "liger":
        if config.trainer.accelerator == "cpu":
            raise SetupError("module.loss=liger is a GPU kernel; use module.loss=chunked, or trainer=gpu")
        if find_spec("liger_kernel") is None:
            raise SetupError("module.loss=liger needs `pip install packflex[liger]`; module.loss=chunked needs nothing")
    backend = config.attention.backend
    if backend is not None and backend not in BACKENDS:
        raise SetupError(f"attention.backend={backend} must be one of {', '.join(BACKENDS)}, or null for the best one")
    if backend in ("hopper", "triton", "torch") and config.trainer.accelerator == "cpu":
        raise SetupError(f"attention.backend={backend} trains on a GPU only; use attention=auto, or trainer=gpu")


def check_whole_number(config: DictConfig, name: str, least: int) -> None:
    """Refuse a setting that is no whole number of at least `least`.

    Raises:
        SetupError: with what it is.
    """
    value = OmegaConf.select(config, name)
    if not _is_whole(value, least):
        raise SetupError(f"{name}={value} must be a whole number of at least {least}")


def check_words(config: DictConfig) -> None:
    """Refuse settings that are none of the words they may be.

    Raises:
        SetupError: with those words.
    """
    for name, known in _WORDS.items():
        value = OmegaConf.select(config, name, default=known[0])  # data=packed and evaluate.py have not all of them
        if value not in known:
            raise SetupError(f"{name}={value} must be one of {', '.join(known)}")


def _check_validations(trainer: DictConfig) -> None:
    """Refuse what Lightning cannot validate by: it says so after the data is read, or divides by it."""
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if not (epochs is None or _is_whole(epochs, 1)):
        raise SetupError(
            f"trainer.check_val_every_n_epoch={epochs} must be a whole number of at least 1, or null: "
            "trainer.val_check_interval then counts batches over epochs"
        )
    timed = isinstance(interval, str) and re.fullmatch(r"\d+:\d\d:\d\d:\d\d", interval)
    if not (interval is None or timed or _is_whole(interval, 1) or (isinstance(interval, float) and 0 < interval <= 1)):
        raise SetupError(
            f"trainer.val_check_interval={interval} must be a whole number of batches, a share of an epoch above 0 and "
            "up to 1.0, a time 'DD:HH:MM:SS', or null for the end of each epoch"
        )
    if epochs is None and not (timed or _is_whole(interval, 1)):
        raise SetupError(
            f"trainer.check_val_every_n_epoch=null counts batches over epochs, and "
            f"trainer.val_check_interval={interval} is no number of them"
        )


def check_options(config: DictConfig, groups: Sequence[str]) -> None:
    """Refuse settings that what a group names does not take.

    Raises:
        SetupError: with those that it takes.
    """
    for group in groups:
        made = instantiate(config[group], _partial_=True)
        _check_known(group, made.func, made.keywords)


def _check_known(group: str, target: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    parameters = inspect.signature(target).parameters
    unknown = sorted(settings.keys() - parameters.keys())
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        raise SetupError(
            f"{group}.{unknown[0]}: {target.__module__}.{target.__qualname__} takes no such option; it takes "
            f"{', '.join(parameters)}"
        )


def tried(group: str, make: Callable[[Any], Any], argument: Any) -> Any:
    """What an optimizer's or scheduler's group makes of its argument; the run makes another one when it begins.

    Raises:
        SetupError: settings that it cannot be made with.
    """
    try:
        return make(argument)
    except (TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]  # OmegaConf adds where in its own lists
        raise SetupError(
            f"{group}: it cannot be made with these settings ({reason}); --cfg job --package {group} shows them"
        ) from error


def check_attention(config: DictConfig, callbacks: Sequence[L.Callback]) -> None:
    """Refuse packed rows for a model whose attention nobody switches.

    Raises:
        SetupError: with the callback to keep.
    """
    ours = issubclass(get_class(config.module._target_), module.CausalLMModule)
    if ours and not any(isinstance(each, callback.PackFlexCallback) for each in callbacks):
        raise SetupError(
            "no PackFlexCallback among callbacks: without it the documents of a row see one another; leave "
            "callbacks.packflex as it is (attention.leak_check=false leaves out its check for leaks)"
        )


def check_monitors(config: DictConfig, callbacks: Sequence[L.Callback]) -> None:
    """Refuse callbacks that wait for a metric that will not come.

    Raises:
        SetupError: the held-out loss without held-out documents, or a name that nobody logs.
    """
    known = {*module.LOGGED, *callback.LOGGED}
    # callbacks and modules of others may log more
    types = [get_class(config.module._target_), *(type(each) for each in callbacks)]
    ours = all(kind.__module__.startswith(("packflex.", "lightning.", "_signals")) for kind in types)
    for each in callbacks:
        if not isinstance(each, EarlyStopping | ModelCheckpoint) or each.monitor is None:
            continue
        what = f"{type(each).__name__} monitors {each.monitor}"
        if each.monitor == "val/loss" and not _holds_out(config.heldout):
            raise SetupError(f"{what}, and no documents are held out; set heldout.percent=5 or heldout.path=...")
        if ours and each.monitor not in known:
            raise SetupError(f"{what}, which nobody logs; choose one of {', '.join(sorted(known))}")


def _holds_out(heldout: DictConfig) -> bool:
    return heldout.path is not None or heldout.split is not None or bool(heldout.percent)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_devices(trainer: DictConfig) -> None:
    if trainer.accelerator not in ("gpu", "cuda"):
        return
    found = torch.cuda.device_count()
    if not found:
        raise SetupError(
            f"trainer.accelerator={trainer.accelerator}, and torch {torch.__version__} sees no CUDA GPU; use "
            "trainer=cpu, or check the driver and that torch is a CUDA build (packflex doctor)"
        )
    if isinstance(trainer.devices, int) and trainer.devices > found:
        raise SetupError(f"trainer.devices={trainer.devices}, and there are {found} GPUs; ask for at most {found}")


def check_sharing(config: DictConfig, trainer: L.Trainer) -> None:
    """Refuse ranks that cannot share rows.

    Raises:
        SetupError: with the reason.
    """
    size = config.trainer.context_parallel_size
    if size == 1:
        return
    if trainer.world_size % size:
        raise SetupError(
            f"trainer.context_parallel_size={size} must divide the number of processes, {trainer.world_size}; use "
            "trainer=ddp and trainer.devices"
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise SetupError("trainer.context_parallel_size works with trainer=ddp; with trainer=fsdp leave it at 1")
    if config.module.loss_weighting != "token":
        raise SetupError(
            f"module.loss_weighting={config.module.loss_weighting} counts whole documents, and "
            "trainer.context_parallel_size splits them over ranks; use module.loss_weighting=token"
        )


def check_single_run(trainer: L.Trainer) -> None:
    """Refuse a multirun over several devices whose ranks Lightning would start; those of SLURM or torchrun are there.

    Raises:
        SetupError: with the reason.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN or trainer.world_size == 1:
        return
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or not environment.creates_processes_externally:
        raise SetupError(
            f"--multirun with {trainer.world_size} devices: Lightning starts each further rank with this command line, "
            "--multirun included, so every rank would run a sweep of its own; start one run for each setting, use "
            "trainer.devices=1, or a launcher that starts the ranks (hydra/launcher=slurm)"
        )


def check_stream(config: DictConfig) -> None:
    """Refuse settings that a stream does not have, before it is read.

    Raises:
        SetupError: a strategy or an order that needs all documents before, shared rows, a run without an end.
    """
    packing, prepared = config.packing, "or pack the documents first (packflex pack, data=packed)"
    if config.data.kind not in KINDS:
        raise SetupError(
            f"data.kind={config.data.kind} is not read as it comes; data=stream takes {', '.join(KINDS)}, {prepared}"
        )
    if packing.strategy != "best_fit":
        raise SetupError(
            f"packing.strategy={packing.strategy} needs all documents before, and data=stream has packing=best_fit; "
            f"choose that, {prepared}"
        )
    if packing.order == "balanced":
        raise SetupError(
            "packing.order=balanced needs all rows before, and a stream's rows come in its own order; leave it out, "
            f"{prepared}"
        )
    if config.trainer.context_parallel_size > 1:
        raise SetupError(
            f"trainer.context_parallel_size={config.trainer.context_parallel_size} does not go with data=stream; set "
            f"it to 1, {prepared}"
        )
    if config.trainer.max_steps <= 0:
        raise SetupError("a stream has no end: set trainer.max_steps")
    if config.heldout.split is not None or (config.heldout.path is None and config.heldout.percent):
        raise SetupError(
            "documents of a stream are not held out; give another file (heldout.path=...), or go without "
            "(heldout.percent=0)"
        )


def stream_settings(config: DictConfig, accumulate: int) -> dict[str, Any]:
    """What `StreamDataModule` takes of a config whose number of steps is known."""
    kept = ("seq_len", "batch_size", "overflow", "num_workers", "pool")
    return {name: config.packing[name] for name in kept} | {"num_batches": config.steps.total * accumulate}


def fill_in(config: DictConfig, trainer: L.Trainer, rows: int | None) -> None:
    """Set what follows from the rest: the learning rate's default, the number of steps and of warm-up steps.

    Args:
        config: changed in place.
        trainer: for the number of devices and its limits.
        rows: packed rows to train on; None for a stream, which has no end.

    Raises:
        SetupError: a run without an end.
    """
    if config.optimizer.lr is None:
        start = "pretrained" if is_pretrained(config.model.path, config.model.init) else "random"
        if config.peft._target_ is not None:
            start = "adapters"
        config.optimizer.lr = config.learning_rate[start]
    sharing = config.trainer.context_parallel_size
    rows_per_step = config.packing.batch_size * (trainer.world_size // sharing)
    if rows is None:
        config.steps.total = trainer.max_steps
    else:
        _check_interval(config.trainer, math.ceil(rows / rows_per_step))
    if rows is not None and config.steps.total is None:
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
        done, state = progress(config.ckpt_path)
        by_epochs = done + steps_to_come(rows, rows_per_step, trainer.accumulate_grad_batches, epochs, state)
        total = min(by_epochs, trainer.max_steps if trainer.max_steps > 0 else math.inf)
        if math.isinf(total):
            raise SetupError("the run has no end: set trainer.max_steps or trainer.max_epochs")
        config.steps.total = int(total)
    if config.steps.warmup is None:
        config.steps.warmup = max(1, round(config.steps.total * config.steps.warmup_share))


def _check_interval(trainer: DictConfig, batches: int) -> None:
    """Refuse to validate after more batches than an epoch has, where they are counted from its first."""
    interval = trainer.val_check_interval
    if trainer.check_val_every_n_epoch is not None and _is_whole(interval, 1) and interval > batches:
        raise SetupError(
            f"trainer.val_check_interval={interval} is more than the batches of an epoch ({batches}); lower it, or let "
            "it count over epochs with trainer.check_val_every_n_epoch=null"
        )

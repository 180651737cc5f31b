"""Checkpoints that a run goes on from: checks that it can, and what they say about the run before."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed.checkpoint as dcp
from _sharding import whole_copy
from lightning.pytorch.strategies import ModelParallelStrategy

from packflex.integrations.lightning.resume import loader_states
from packflex.models import SetupError

_NOT_OF_OPTIMIZERS = {"params", "initial_lr"}  # in their groups of parameters; the second is a scheduler's
_HOW_IT_COMPUTES = {"foreach", "fused", "capturable", "differentiable"}  # settings that change no result
_ANEW = "start a new run from its model (model.path=...)"


def check_checkpoint(path: str | None, max_steps: int) -> int:
    """Refuse a checkpoint that a run cannot go on from, before the data is read.

    Returns:
        Optimizer steps done so far, 0 without a checkpoint.

    Raises:
        SetupError: no such file or (sharded) folder, a file that is no checkpoint, or one of a longer run.
    """
    if path is None:
        return 0
    if Path(path).is_dir() and not (Path(path) / ".metadata").is_file():
        raise SetupError(
            f"{path}: a folder that is no sharded checkpoint; ckpt_path is a file such as checkpoints/last.ckpt, or "
            "the folder that trainer=fsdp wrote in its place"
        )
    if not Path(path).exists():
        if (copy := whole_copy(Path(path))) is not None:
            raise SetupError(
                f"{path}: not there, for a run was killed while it replaced it; a whole one is {copy}: give that, or "
                "rename it"
            )
        raise SetupError(
            f"{path}: no such checkpoint; ckpt_path is a file that a run wrote, such as checkpoints/last.ckpt"
        )
    try:
        steps = _loaded(path)["global_step"]
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise SetupError(f"{path}: no checkpoint of this recipe; give one such as checkpoints/last.ckpt") from error
    if 0 <= max_steps < steps:
        raise SetupError(
            f"{path}: this run has done its {steps} steps, and trainer.max_steps={max_steps}; raise trainer.max_steps "
            "to go on"
        )
    return steps


def check_same_model(path: str | None, module: L.LightningModule) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        SetupError: naming the first weight that differs.
    """
    if path is None or Path(path).is_dir():
        return
    saved = {name: tuple(value.shape) for name, value in _loaded(path)["state_dict"].items()}
    mine = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in sorted(saved.keys() | mine.keys()):
        if saved.get(name) != mine.get(name):
            raise SetupError(
                f"{path}: a checkpoint of another model: {name} has shape {saved.get(name, 'none')} there and "
                f"{mine.get(name, 'none')} here; resume with the settings of its run (its config.yaml)"
            )


def check_same_loss(path: str | None, weighting: str) -> None:
    """Refuse a checkpoint of a run that weighed its documents in another way.

    Raises:
        SetupError: with both weightings.
    """
    saved = weighting if path is None else _loaded(path).get("loss_weighting", weighting)
    if saved != weighting:
        raise SetupError(
            f"{path}: its run had module.loss_weighting={saved}, and this one has module.loss_weighting={weighting}; "
            f"resume with that of its run, or {_ANEW}"
        )


def check_same_optimizer(path: str | None, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a checkpoint of another optimizer, of one with other settings, or of none.

    Args:
        path: of the checkpoint.
        optimizer: of this run, after its scheduler was made: that notes the learning rate before warm-up.

    Raises:
        SetupError: with the settings of both.
    """
    if path is None:
        return
    saved = _optimizer_groups(path)
    if not saved:
        raise SetupError(
            f"{path}: holds weights without an optimizer (save_weights_only), so no run can go on from it; give "
            "another checkpoint"
        )
    groups = optimizer.state_dict()["param_groups"]
    there, here = (set(of[0]) - _NOT_OF_OPTIMIZERS for of in (saved, groups))
    # both ways: another version of torch may have a setting more
    if there - here and here - there:
        raise SetupError(
            f"{path}: written with another optimizer: it has {', '.join(sorted(there - here))}, and "
            f"{type(optimizer).__name__} has {', '.join(sorted(here - there))} instead; resume with the optimizer of "
            f"its run (its config.yaml), or {_ANEW}"
        )
    for old, new in zip(saved, groups, strict=False):
        changed = changed_settings(type(optimizer), old, new)
        if changed:
            before, now = (
                ", ".join(f"optimizer.{name.removeprefix('initial_')}={_plain(of[name])}" for name in changed)
                for of in (old, new)
            )
            raise SetupError(
                f"{path}: its run had {before}, and this one has {now}, which a resumed optimizer does not take up; "
                f"resume with the settings of its run, or {_ANEW}"
            )


def changed_settings(kind: type[torch.optim.Optimizer], old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of what differs between a group of a checkpoint and one of a run, but for what moves while a run goes on.

    An optimizer's other values are its state, and schedulers move the learning rate, some of them the momentum too.
    """
    moved = {"params", "lr"} | _HOW_IT_COMPUTES
    if {"base_momentum", "max_momentum"} & old.keys():
        moved |= {"momentum", "betas"}
    settings = ({"initial_lr", *inspect.signature(kind).parameters} - moved) & old.keys() & new.keys()
    return sorted(name for name in settings if _plain(old[name]) != _plain(new[name]))


def _plain(value: Any) -> Any:
    """A setting as it is compared: lists come back from checkpoints as tuples, numbers may be tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _optimizer_groups(path: str) -> list[dict[str, Any]]:
    """The optimizer's groups of parameters in a checkpoint; none in one without an optimizer."""
    if not Path(path).is_dir():
        states = _loaded(path).get("optimizer_states")
        return states[0]["param_groups"] if states else []
    prefix = "optimizer_0.param_groups."
    names = [n for n in dcp.FileSystemReader(path).read_metadata().state_dict_metadata if n.startswith(prefix)]
    values: dict[str, Any] = dict.fromkeys(names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*load in a single process", UserWarning)
        dcp.load(values, checkpoint_id=path, no_dist=True)
    groups: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        number, _, setting = name.removeprefix(prefix).partition(".")
        groups.setdefault(int(number), {})[setting] = value
    return [groups[number] for number in sorted(groups)]


def check_sharded(path: str | None, trainer: L.Trainer) -> None:
    """Refuse a sharded checkpoint where the run is not.

    Raises:
        SetupError: with the reason.
    """
    if path is not None and Path(path).is_dir() and not isinstance(trainer.strategy, ModelParallelStrategy):
        raise SetupError(
            f"{path}: a sharded checkpoint, which only trainer=fsdp goes on from, on one device too: trainer=fsdp "
            "trainer.devices=1"
        )


def progress(path: str | None) -> tuple[int, dict[str, Any] | None]:
    """Optimizer steps of a checkpoint, and where its training loader stood."""
    if path is None:
        return 0, None
    checkpoint = _loaded(path)
    return checkpoint["global_step"], next(iter(loader_states(checkpoint)), None)


def _loaded(path: str) -> dict[str, Any]:
    """A checkpoint whose tensors stay on the disk; of a sharded one, what is not sharded."""
    if Path(path).is_dir():
        path = f"{path}/meta.pt"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

"""Ranks that something else than Lightning starts: torchrun, SLURM, submitit on this machine; and how Lightning may."""

from __future__ import annotations

import os
from datetime import timedelta

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from omegaconf import DictConfig
from torch.distributed import TCPStore

from packflex.models import SetupError

_WAIT = timedelta(minutes=5)
_kept: list[TCPStore] = []  # the first rank's store answers for as long as the process runs


def join_ranks(config: DictConfig) -> None:
    """Let ranks that run this recipe side by side work on one run: before Lightning looks at what started them.

    Raises:
        SetupError: tasks of submitit on this machine that are not as many as the devices.
    """
    tasks = int(os.environ.get("SUBMITIT_LOCAL_NTASKS", "1"))
    if tasks > 1:
        if config.trainer.devices != tasks:
            raise SetupError(
                f"hydra.launcher.tasks_per_node={tasks} starts a process for each device, and trainer.devices="
                f"{config.trainer.devices}: give both the same number"
            )
        _as_torchrun()
    environment = _started_elsewhere()
    if environment is None or environment.world_size() < 2:
        return
    # each rank named its folder by its own clock
    config.paths.output_dir = _first_ranks(environment, str(config.paths.output_dir))


def check_processes(config: DictConfig, trainer: L.Trainer) -> None:
    """Refuse ranks that are copies of this process, made for a part of the run: their state is gone after it.

    Raises:
        SetupError: with the strategy to use.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise SetupError(
            f"trainer.strategy={config.trainer.strategy} trains in copies of this process that never hand back the "
            "step and the optimizer's state, which a checkpoint needs; use trainer.strategy=ddp"
        )


def _as_torchrun() -> None:
    """What torchrun would have set; on SLURM, Lightning asks SLURM itself."""
    from submitit.helpers import TorchDistributedEnvironment

    # one that what started the sweep had for itself would be that of all its jobs at once
    os.environ.pop("MASTER_PORT", None)
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    # submitit's port of the job, below those that the system gives to connections as they come
    os.environ["MASTER_PORT"] = str(20_000 + int(os.environ["MASTER_PORT"]) % 12_000)


def _started_elsewhere() -> ClusterEnvironment | None:
    """As Lightning looks for them, in its order."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            return kind()
    return None


def _first_ranks(environment: ClusterEnvironment, value: str) -> str:
    """The first rank's value, on every rank."""
    first = environment.global_rank() == 0
    # the store that training will use: torchrun's own where it keeps one, else one that the first rank opens for both
    serves = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(
        environment.main_address, environment.main_port, is_master=serves, timeout=_WAIT, wait_for_workers=False,
        multi_tenant=True,
    )  # fmt: skip
    _kept.append(store)
    job = HydraConfig.get().job.num if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN else 0
    key = f"packflex/{job}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if first:
        store.set(key, value)
    return store.get(key).decode()

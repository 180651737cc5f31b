"""Run a function in several processes with a process group among them, one device each, and never wait for ever."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    work: Callable[..., Any], ranks: int, *arguments: Any, device: str = "cpu", timeout: float = 120.0
) -> None:
    """Call `work(rank, *arguments)` on every rank, as torchrun would start them.

    The first error ends all ranks and is raised here; so does the end of the time. Ranks on CPUs are forked and take
    one thread each; ranks on GPUs are spawned, so `work` must be importable there, and rank i has GPU i.

    Args:
        work: a function of a module.
        ranks: how many.
        arguments: for `work`, after the rank.
        device: "cpu" (gloo) or "cuda" (nccl).
        timeout: seconds for all of it, starting the processes included.

    Raises:
        TimeoutError: not all ranks were done in time.
        torch.multiprocessing.ProcessRaisedException: with the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.start_processes(
            _enter, (ranks, device, folder, port, work, arguments), ranks, join=False,
            start_method="fork" if device == "cpu" else "spawn",
        )  # fmt: skip
        assert context is not None
        deadline = time.monotonic() + timeout
        while not context.join(timeout=max(0.0, min(1.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{work.__name__} on {ranks} ranks was not done in {timeout:.0f} s")


def _enter(
    rank: int, ranks: int, device: str, folder: str, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # what torchrun sets, for libraries that look for it
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    options: dict[str, Any] = {}
    if device == "cuda":
        torch.cuda.set_device(rank)
        options["device_id"] = torch.device("cuda", rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{Path(folder) / 'rendezvous'}",
        rank=rank,
        world_size=ranks,
        **options,
    )
    try:
        work(rank, *arguments)
        dist.barrier()  # a rank that leaves first takes its connections with it
    finally:
        dist.destroy_process_group()

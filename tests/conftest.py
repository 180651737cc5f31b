"""Without a GPU, Triton kernels run in Triton's interpreter; the switch must be set before any kernel is defined."""

import os

import pytest
import torch

torch.set_num_threads(1)  # tests run side by side, one process a core


def pytest_configure(config: pytest.Config) -> None:
    if "not gpu" in config.getoption("markexpr"):  # `make test` is the same on a machine with a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"

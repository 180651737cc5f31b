"""GPU tests: deselected by `make test`, run by `make test-gpu`; without a GPU they fail rather than pass unseen."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_gpu():
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device; `make test` runs everything else")

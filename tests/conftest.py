"""Without a GPU, Triton kernels run in Triton's interpreter; the switch must be set before any kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # tests run side by side, one process a core

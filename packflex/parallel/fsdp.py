"""Fully sharded weights (torch's FSDP2): each decoder layer is one unit that is gathered when it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def shard_model(model: Any, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Shard a transformers model over the ranks of a mesh, in place.

    Args:
        model: a transformers model; `_no_split_modules` names its layers.
        mesh: one-dimensional.
        dtype: to gather and compute in; the weights' own when None. Gradients are added up in float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    kinds = set(model._no_split_modules or ())
    for layer in [module for module in model.modules() if type(module).__name__ in kinds]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

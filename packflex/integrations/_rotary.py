"""Rotary tables that a compiled model computes once a step.

A packed row's positions restart in each document, so a model makes its tables of cosines and sines anew in each step,
`[B, S, D]`. torch.compile does not keep them: it puts the cosine and the sine of each element into the kernels of every
layer that rotates queries or keys, forward and backward.

Modules named `...RotaryEmbedding` that return `(cos, sin)` are seen to, as nearly all of transformers' families have
them; those that return one complex tensor (DeepSeek-V2, Llama 4) stay as they are. So do exported programs, which must
load where packflex is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("packflex::kept_table", mutates_args=())
def kept_table(table: Tensor) -> Tensor:
    """A contiguous copy; a compiler computes it where it stands, and reads it everywhere else."""
    return table.clone(memory_format=torch.contiguous_format)


@kept_table.register_fake
def _(table: Tensor) -> Tensor:
    return torch.empty_like(table, memory_format=torch.contiguous_format)


def keep_rotary_tables(model: nn.Module) -> None:
    """Let every rotary embedding of a transformers model keep its tables in compiled code; eager code does anyway."""
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding") and _keep not in module._forward_hooks.values():
            module.register_forward_hook(_keep)


def _keep(module: nn.Module, args: tuple[Any, ...], tables: Any) -> Any:
    """Forward hook, for `(cos, sin)` of several tokens, which learn nothing; what else is returned stays as it is."""
    if not torch.compiler.is_compiling() or _is_exporting() or not isinstance(tables, tuple):
        return tables
    if not all(isinstance(table, Tensor) and not table.requires_grad for table in tables):
        return tables
    if any(table.dim() < 2 or table.shape[-2] == 1 for table in tables):  # generation: cheaper anew than an op's call
        return tables
    return tuple(kept_table(table) for table in tables)


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    """Asked by Python while a compiler traces: torch 2.11's answers True in whatever torch.compile traces itself."""
    return torch.compiler.is_exporting()

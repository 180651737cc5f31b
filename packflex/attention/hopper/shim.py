"""The Gluon names that changed between Triton 3.6 and 3.9, under one spelling. Nothing else here asks for a version."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# 3.6 and 3.7: async_copy_global_to_shared and async_copy_shared_to_global; 3.8: async_load and async_store
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# 3.6: thread_barrier; 3.7: barrier
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

if hasattr(tma, "async_atomic_add"):  # 3.8
    tma_add = tma.async_atomic_add
else:

    @builtin
    def tma_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Add a tile of shared memory to global memory: one TMA reduction, fp32 in L2."""
        from triton._C.libtriton import ir

        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)

"""The Gluon names that changed between Triton 3.6 and 3.9, under one spelling. Nothing else here asks for a version."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

# 3.6 and 3.7: async_copy_global_to_shared and async_copy_shared_to_global; 3.8: async_load and async_store
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

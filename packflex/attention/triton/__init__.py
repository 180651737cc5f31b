"""Portable Triton kernels (sm_80 and later, and the interpreter); the only floor here that imports Triton."""

"""Attention under any score_mod and mask_mod: kernels printed from the traced programs."""

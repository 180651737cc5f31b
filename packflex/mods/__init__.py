"""score_mod and mask_mod as programs: traced once, differentiated, and printed into Triton kernels."""

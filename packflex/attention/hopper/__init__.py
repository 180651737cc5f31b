"""Kernels for Hopper (sm_90) in Gluon: one TMA producer warp and consumer warpgroups that issue wgmma."""

"""Triton kernels, one file per op; installed as ``e3va.kernels``. They know nothing of modules."""

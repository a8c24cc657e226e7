"""Compiled kernels: their builds and sources, for CPUs in C and for CUDA in Triton."""

"""Kernels for processors: numba for few rows, BLAS for many."""

"""Kernels for processors: numba for few rows, BLAS for many.

What may reorder float arithmetic (`fastmath`) is inlined (`forceinline`): numba keeps a function's own code beside the
copy in each caller, and which of them runs depends on whether the caller was compiled now or loaded from disk.
"""

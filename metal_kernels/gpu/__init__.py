"""Kernels for Metal and CUDA: what they need to know is checked and chosen here, the work is in `source/`."""

"""Kernels for CPUs, compiled when first used (numba): imported only where they can run."""

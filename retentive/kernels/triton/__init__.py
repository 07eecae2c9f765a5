"""Kernels for NVIDIA GPUs, imported only where one of them is used: `import triton` costs time.

The op: `chunkwise`, made of `states` (from chunk to chunk) and `output` (what a chunk reads), which
share `tiles`, `spans` and `configs`. Around it: `rotation`, `norm_gate`, `decode`. For all:
`available` (why they may not be had here), `interpreter` (running them without a GPU) and `cases`
(what they are compiled for).
"""

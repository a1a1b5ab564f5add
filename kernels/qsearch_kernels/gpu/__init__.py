"""Triton kernels for NVIDIA GPUs, Hopper first: one kernel a file, each beside a plain-torch twin
in `reference.py` or `reference_a8.py`.
"""

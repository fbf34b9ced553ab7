"""Fused kernels, a folder each: the entry with shapes and maths, its reference in PyTorch, Triton code."""

"""Fused kernels, a folder each: entry with shapes and maths, reference in PyTorch, Triton code."""

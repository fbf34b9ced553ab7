"""Fused kernels, a folder each. None ships yet: the relevance graph is plain ATen, which Inductor fuses."""

"""Benchmarks: correctness first, contenders interleaved in one run, medians, devices and versions."""

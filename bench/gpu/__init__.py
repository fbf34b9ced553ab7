"""What kernels and explanations do on a GPU, in one command: ``python -m bench.gpu --out DIR``."""

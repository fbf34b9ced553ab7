"""Independent oracles for fxlrp: they import torch (and transformers in the model oracles), never fxlrp.

``rules``   paper-literal rules in the relevance domain (relevance in, relevance out, float64)
``engine``  a small interpreter that walks a list of steps backwards with ``rules``
``gxi``     the detach and scaled-gradient tricks of Gradient x Input with modified gradients
``llama``, ``bert``, ``gpt2``, ``t5``, ``vit``  hand-patched Gradient x Input on the HF model's own weights
``models``  tiny random HF models for tests
"""

"""Softmax, norms and gates: bound by memory, so measured against a copy."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fxlrp.kernels import gate, norm, softmax

from .cases import Case, Line, Setup, normal, pair

_LINES = (Line("copy", at_least=0.85), Line("inductor", at_least=1.0))


def _softmax(scores: Tensor) -> Tensor:
    return (scores * 0.125).softmax(-1)


def _softmax_relevance(g: Tensor, s: Tensor) -> Tensor:
    return 0.125 * s * (g - (s * g).sum(-1, keepdim=True))


def _rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    wide = h if h.dtype == torch.float64 else h.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (wide * rstd).to(x.dtype) * weight, h


def _norm_relevance(g: Tensor, rstd: Tensor, weight: Tensor, added: Tensor, centred: bool) -> Tensor:
    c = g * weight
    c = c - c.mean(-1, keepdim=True) if centred else c
    return added + (c * rstd).to(g.dtype)


def _gate(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def _gate_relevance(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    half = 0.5 * g
    return half * b * a.sigmoid(), half * F.silu(a)


def _gelu_relevance(g: Tensor, x: Tensor) -> Tensor:
    return g * 0.5 * (1 + torch.erf(x * 0.5**0.5))


def _of_scores(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    return pair(lambda x: softmax.softmax(x, None, 0.125), _softmax, (normal(shape, dtype, device, 8.0),))


def _of_probabilities(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    s = normal(shape, torch.float32, device).softmax(-1).to(dtype)
    call = functools.partial(softmax.softmax_relevance, scale=0.125)
    return pair(call, _softmax_relevance, (normal(shape, dtype, device), s))


def _of_sum(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    inputs = normal(shape, dtype, device), normal(shape, dtype, device), normal(shape[-1:], dtype, device)
    return pair(lambda x, r, w: norm.add_norm(x, r, w, None, 1e-6)[:2], _rms_norm, inputs)


def _of_norm(centred: bool, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    rstd = normal((shape[0], 1), torch.float32, device).abs() + 0.1
    weight = normal(shape[-1:], dtype, device)
    inputs = normal(shape, dtype, device), rstd, weight, normal(shape, dtype, device), centred

    def call(g: Tensor, r: Tensor, w: Tensor, added: Tensor, c: bool) -> Tensor:
        return norm.norm_relevance(g, r, w, added, 1.0, 0.0, c)

    return pair(call, _norm_relevance, inputs)


def _of_gate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    inputs = normal(shape, dtype, device), normal(shape, dtype, device)
    return pair(functools.partial(gate.gate, activation="silu"), _gate, inputs)


def _of_product(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    inputs = tuple(normal(shape, dtype, device) for _ in range(3))
    return pair(functools.partial(gate.gate_relevance, activation="silu"), _gate_relevance, inputs)


def _of_gelu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Setup:
    inputs = normal(shape, dtype, device), normal(shape, dtype, device)
    return pair(functools.partial(gate.activation_relevance, activation="gelu"), _gelu_relevance, inputs)


def _shapes(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {"tiny": (3, 40), "gate": (257, min(columns, 3000)), "full": (rows, columns)}


CASES = (
    Case("softmax", "forward", _of_scores, _shapes(65536, 1024), _LINES),
    Case("softmax", "relevance", _of_probabilities, _shapes(65536, 1024), _LINES),
    Case("softmax", "relevance", _of_probabilities, _shapes(16384, 4096), _LINES),
    Case("softmax", "relevance", _of_probabilities, _shapes(4096, 32768), _LINES),
    Case("softmax", "relevance", _of_probabilities, _shapes(32768, 1024), _LINES, torch.float32),
    Case("norm", "residual sum and RMSNorm", _of_sum, _shapes(16384, 4096), _LINES),
    Case("norm", "relevance of RMSNorm", functools.partial(_of_norm, False), _shapes(16384, 4096), _LINES),
    Case("norm", "relevance of LayerNorm", functools.partial(_of_norm, True), _shapes(65536, 768), _LINES),
    Case("gate", "SwiGLU", _of_gate, _shapes(8192, 11008), _LINES),
    Case("gate", "relevance of SwiGLU", _of_product, _shapes(8192, 11008), _LINES),
    Case("gate", "relevance of GELU", _of_gelu, _shapes(16384, 3072), _LINES),
)

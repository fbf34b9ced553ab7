"""Launches of attention's kernels, and every configuration that they choose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from ..launch import Variant, launch
from . import tiles
from . import variants as configurations
from .forward import attend
from .relevance import of_keys, of_queries, prepare
from .scoring import MASKED, Scoring

_LOG2E = 1.4426950408889634
#: What every tile's number of queries divides.
_TILE = 128
#: Largest distance of rows whose tiles kernels address in 32 bits.
_FARTHEST = 1 << 22


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """See :func:`fxlrp.kernels.attention.attention_forward`."""
    problem = _Problem.of(q, k, v.shape[-1], mask, scoring)
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = _like(q, *q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    cut = problem.tiles("forward")
    if problem.is_empty:
        return out, lse
    launch(attend)[(_blocks(problem.queries, cut.queries) * problem.batch * problem.heads,)](
        q, k, v, problem.mask, q if sinks is None else sinks.contiguous(), out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *problem.mask.stride(),
        problem.heads, problem.group, problem.queries, problem.keys, scoring.offset, scoring.window or 0,
        *problem.factors,
        **problem.constants(), QUERIES=cut.queries, KEYS=cut.keys, SINKS=sinks is not None,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out, lse


def relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    g: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    epsilon: float,
    score_epsilon: float,
    shares: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fxlrp.kernels.attention.attention_relevance`."""
    problem = _Problem.of(q, k, v.shape[-1], mask, scoring)
    q, k, v, g = _rows(q), _rows(k), _rows(v), _rows(g)
    gs = g if g.dim() == 5 else g[None]
    delta = lse
    if epsilon or shares[0] or shares[1]:
        gs, delta = _prepare(problem, _rows(out), gs, epsilon)
    lead, log_sums = g.shape[:-4], _base_2(lse)
    of_q, of_k, of_v = (
        _like(x, *lead, *x.shape) if share else x.new_empty(0)
        for x, share in zip((q, k, v), shares, strict=True)
    )
    if shares[0]:
        _launch_of_queries(problem, q, k, v, gs, log_sums, delta, score_epsilon, of_q, shares[0])
    found = (of_k if shares[1] else None, of_v if shares[2] else None)
    together = max(problem.head_sizes) <= tiles.TOGETHER
    for pair in [found] if together else [(found[0], None), (None, found[1])]:
        if pair != (None, None):
            _launch_of_keys(problem, q, k, v, gs, log_sums, delta, score_epsilon, pair, shares[1:])
    return of_q, of_k, of_v


def frozen_relevance(
    q: Tensor, k: Tensor, lse: Tensor, g: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """See :func:`fxlrp.kernels.attention.attention_frozen_relevance`."""
    problem = _Problem.of(q, k, g.shape[-1], mask, scoring)
    q, k, g = _rows(q), _rows(k), _rows(g)
    of_v = _like(q, *g.shape[:-4], *k.shape[:3], g.shape[-1])
    gs = g if g.dim() == 5 else g[None]
    _launch_of_keys(problem, q, k, k, gs, _base_2(lse), lse, 0.0, (None, of_v), (0.0, 1.0))
    return of_v


@dataclass(frozen=True, eq=False)
class _Problem:
    """Sizes of a call and what its kernels are specialised on.

    Attributes:
        mask: expanded to ``[batch, heads, queries, keys]``; any tensor where there is none.
    """

    q: Tensor
    mask: Tensor
    scoring: Scoring
    batch: Any
    heads: int
    group: int
    queries: Any
    keys: Any
    head_sizes: tuple[int, int]
    mask_kind: str
    per_key: bool
    kind: str

    @staticmethod
    def of(q: Tensor, k: Tensor, value_size: int, mask: Tensor | None, scoring: Scoring) -> _Problem:
        batch, heads, queries, head_size = q.shape
        kind, per_key, given = "none", True, q
        if mask is not None:
            kind = "keep" if mask.dtype == torch.bool else "add"
            per_key = mask.dim() == 1 or statically_known_true(mask.shape[-2] == 1)
            given = mask.view(torch.uint8) if kind == "keep" else mask
            given = given.expand(batch, heads, queries, k.shape[2])
        return _Problem(
            q, given, scoring, batch, heads, heads // k.shape[1], queries, k.shape[2],
            (head_size, value_size), kind, per_key, tiles.kind_of(q.device),
        )  # fmt: skip

    @property
    def is_empty(self) -> bool:
        """Whether it is known that there is no query."""
        return statically_known_true(self.batch * self.queries == 0)

    @property
    def factors(self) -> tuple[float, float]:
        """What raw scores are multiplied with before and after the cap, to base 2."""
        cap = self.scoring.soft_cap
        if cap is None:
            return self.scoring.scale * _LOG2E, 1.0
        return self.scoring.scale / cap, cap * _LOG2E

    def tiles(self, kernel: str, targets: Any = 1, score_epsilon: float = 0.0) -> tiles.Tiles:
        """The tiles of a kernel; an unknown number of targets counts as many."""
        given = self.scoring
        laden = bool(given.window is not None or given.soft_cap or score_epsilon or not self.per_key)
        number = targets if isinstance(targets, int) else None
        return tiles.choose(kernel, self.kind, self.q.dtype, max(self.head_sizes), number, laden)

    def constants(self) -> dict[str, Any]:
        """What all kernels are specialised on."""
        scoring = self.scoring
        cap = "none" if scoring.soft_cap is None else "gradient" if scoring.cap_gradient else "identity"
        return {
            **_sizes(*self.head_sizes),
            "MASK": self.mask_kind,
            "PER_KEY": self.per_key,
            "CAUSAL": scoring.causal,
            "WINDOW": scoring.window is not None,
            "CAP": cap,
            "PRECISION": precision(self.kind),
        }


def variants() -> Iterator[Variant]:
    """Every configuration that a launch can choose."""
    return configurations.variants({kind: precision(kind) for kind in tiles.TARGETS})


def precision(kind: str) -> str:
    """Products of float32: three of tf32, as exact as float32, where there is no unit for float32."""
    return "tf32x3" if kind in ("ampere", "hopper", "blackwell") else "ieee"


def _sizes(head_size: int, value_size: int) -> dict[str, int]:
    return {"D": head_size, "E": value_size, "DP": tiles.padded(head_size), "EP": tiles.padded(value_size)}


def _rows(x: Tensor) -> Tensor:
    """With neighbours in the last dimension and rows not too far apart; a copy where they are not."""
    near = x.stride(-1) == 1, x.stride(-2) <= _FARTHEST
    return x if all(map(statically_known_true, near)) else x.contiguous()


def _base_2(lse: Tensor) -> Tensor:
    """``log2`` of denominators; inf, so that probabilities are 0, in masked rows and up to whole tiles."""
    log_sums = torch.where(lse < MASKED, math.inf, lse * _LOG2E).contiguous()
    return F.pad(log_sums, (0, _spaced(lse.shape[-1]) - lse.shape[-1]), value=math.inf)


def _spaced(queries: Any) -> Any:
    """Queries in whole tiles of any size."""
    return _blocks(queries, _TILE) * _TILE


def _like(x: Tensor, *shape: Any) -> Tensor:
    """An uninitialised tensor of shape ``[..., heads, positions, size]``, heads side by side in memory."""
    *lead, heads, positions, size = shape
    return x.new_empty((*lead, positions, heads, size)).transpose(-3, -2)


def _blocks(count: Any, size: int) -> Any:
    return (count + size - 1) // size


def _lead(x: Tensor) -> tuple[Any, ...]:
    """Strides of targets, batch, heads and positions."""
    return x.stride()[:4] if x.dim() == 5 else (0, *x.stride()[:3])


def _prepare(problem: _Problem, out: Tensor, gs: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``G' = sigma(out) G`` and ``sum(out G')``."""
    damped = _like(gs, *gs.shape) if epsilon else gs
    spaced = _spaced(problem.queries)
    delta = gs.new_empty((*gs.shape[:3], spaced), dtype=torch.float32)
    if problem.is_empty:
        return damped, delta
    programs = problem.batch * problem.heads
    size = problem.head_sizes[1]
    launch(prepare)[(spaced // tiles.PREPARED.queries * programs,)](
        out, gs, damped, delta, *out.stride()[:3], *_lead(gs), *_lead(damped),
        programs, problem.heads, problem.queries, spaced, gs.shape[0],
        max(epsilon, torch.finfo(torch.float32).tiny),
        E=size, EP=tiles.padded(size), QUERIES=tiles.PREPARED.queries, DAMP=bool(epsilon),
        num_warps=tiles.PREPARED.warps,
    )  # fmt: skip
    return damped, delta


def _launch_of_queries(
    problem: _Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gs: Tensor,
    lse: Tensor,
    delta: Tensor,
    score_epsilon: float,
    found: Tensor,
    share: float,
) -> None:
    if problem.is_empty or statically_known_true(gs.shape[0] == 0):
        return
    cut = problem.tiles("of_queries", gs.shape[0], score_epsilon)
    programs, scoring = problem.batch * problem.heads, problem.scoring
    units = programs * _blocks(gs.shape[0], cut.targets)
    launch(of_queries)[(_blocks(problem.queries, cut.queries) * units,)](
        q, k, v, gs, lse, delta, problem.mask, found,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_lead(gs), *_lead(found), *problem.mask.stride(),
        programs, problem.heads, problem.group, problem.queries, lse.shape[-1], problem.keys, gs.shape[0],
        scoring.offset, scoring.window or 0, *problem.factors, score_epsilon, share * scoring.scale,
        **problem.constants(), QUERIES=cut.queries, KEYS=cut.keys, TARGETS=cut.targets,
        DAMP=bool(score_epsilon), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def _launch_of_keys(
    problem: _Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gs: Tensor,
    lse: Tensor,
    delta: Tensor,
    score_epsilon: float,
    found: tuple[Tensor | None, Tensor | None],
    shares: Sequence[float],
) -> None:
    if statically_known_true(problem.batch * problem.keys * gs.shape[0] == 0):
        return
    of_k, of_v = (k if x is None else x for x in found)  # what is not asked for is not written
    cut = problem.tiles("frozen" if found[0] is None else "of_keys", gs.shape[0], score_epsilon)
    programs, scoring = problem.batch * k.shape[1], problem.scoring
    units = programs * _blocks(gs.shape[0], cut.targets)
    launch(of_keys)[(_blocks(problem.keys, cut.keys) * units,)](
        q, k, v, gs, lse, delta, problem.mask, of_k, of_v,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_lead(gs), *_lead(of_k), *_lead(of_v),
        *problem.mask.stride(), programs, k.shape[1], problem.queries, lse.shape[-1], problem.keys,
        gs.shape[0], scoring.offset, scoring.window or 0, *problem.factors, score_epsilon,
        shares[0] * scoring.scale, shares[1],
        **problem.constants(), GROUP=problem.group, QUERIES=cut.queries, KEYS=cut.keys, TARGETS=cut.targets,
        OF_K=found[0] is not None, OF_V=found[1] is not None, DAMP=bool(score_epsilon),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip

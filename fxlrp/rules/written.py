"""Attention written out as the products and the softmax that it is made of, with a rule for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Call, Linearization, Rule, dot, vjp, wide
from .product import Uniform
from .softmax import SoftmaxTaylor

_QUERY, _KEY, _VALUE = range(3)


@dataclass(frozen=True, eq=False)
class _Step:
    """An op of which some operands are active, its rule, and what the rule makes of it."""

    call: Call
    rule: Rule
    step: Linearization

    @staticmethod
    def of(rule: Rule, op: Any, operands: tuple[Any, ...], active: tuple[int, ...]) -> _Step:
        call = Call(op, operands, {}, active)
        return _Step(call, rule, rule.linearize(call) if active else Linearization(call.run(), _nothing))

    def pull(self, cotangent: Tensor) -> dict[int, Tensor]:
        """Coefficients of the active operands by position."""
        found = zip(self.call.active, self.step.pullback(cotangent), strict=True)
        return {i: g for i, g in found if g is not None}

    def epsilon(self, cotangent: Tensor) -> Tensor:
        """What the rule's stabiliser keeps."""
        booked = self.rule.absorbed(self.call, self.step.output, cotangent, ())
        return booked.get("epsilon", torch.zeros((), dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Written:
    """``A v`` with ``A = softmax(scale * q k^T + mask)``, step by step; the softmax in float32 at least.

    Attributes:
        scores: ``q k^T``, whose keys are repeated for groups of query heads.
        weights: the softmax of the scaled and masked scores.
        mixing: ``A v``.
        repeats: of keys, of values.
        scale: of the scores.
    """

    scores: _Step
    weights: _Step
    mixing: _Step
    repeats: tuple[Linearization, Linearization]
    scale: float

    @staticmethod
    def of(call: Call, score_rule: Uniform, weight_rule: SoftmaxTaylor, mixing_rule: Uniform) -> Written:
        """From a call of :func:`fxlrp.rules.ops.attention`."""
        names = ("query", "key", "value", "mask", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        query, mask, scale = given["query"], given.get("mask"), given.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        keys, values = given["key"], given["value"]
        repeat = _repeat(query.shape[-3] // keys.shape[-3]) if given.get("enable_gqa") else _keep
        keys, values = repeat(keys), repeat(values)
        read = tuple(i for i in (_QUERY, _KEY) if i in call.active)
        scores = _Step.of(score_rule, torch.matmul, (query, keys.output.mT), read)
        scaled = masked(wide(scores.step.output) * scale, mask, bool(given.get("is_causal")))
        weights = _Step.of(weight_rule, torch.ops.aten._safe_softmax.default, (scaled, -1), (0,))
        mixed = ((0,) if read else ()) + ((1,) if _VALUE in call.active else ())
        shares = weights.step.output.to(query.dtype)
        mixing = _Step.of(mixing_rule, torch.matmul, (shares, values.output), mixed)
        return Written(scores, weights, mixing, (keys, values), scale)

    def pullback(self, cotangent: Tensor) -> dict[int, Tensor]:
        """From the coefficient of the output to those of the active ones of q, k and v, by position."""
        arrived = self.mixing.pull(cotangent)
        found = {}
        if 1 in arrived:
            found[_VALUE] = self._heads(1, arrived[1])
        if 0 in arrived:
            scores = self.scores.pull(self._of_scores(arrived[0]))
            found.update({i: g if i == _QUERY else self._heads(0, g.mT) for i, g in scores.items()})
        return found

    def absorbed(self, cotangent: Tensor) -> dict[str, Tensor]:
        """What stabilisers keep, and what the softmax's Taylor step and the mask leave over."""
        kept, arrived = self.mixing.epsilon(cotangent), self.mixing.pull(cotangent)
        if 0 not in arrived:
            return {"epsilon": kept}
        of_scores = self._of_scores(arrived[0])
        left = dot(self.weights.step.output, arrived[0]) - dot(self.scores.step.output, of_scores)
        return {"epsilon": kept + self.scores.epsilon(of_scores), "remainder": left}

    def _of_scores(self, of_weights: Tensor) -> Tensor:
        found = self.weights.pull(of_weights.to(self.weights.step.output.dtype))[0] * self.scale
        return found.to(of_weights.dtype)

    def _heads(self, which: int, cotangent: Tensor) -> Tensor:
        """Back to the heads that keys or values have."""
        (found,) = self.repeats[which].pullback(cotangent)
        assert found is not None
        return found


def _nothing(cotangent: Tensor) -> tuple[Tensor | None, ...]:
    return ()


def _keep(x: Tensor) -> Linearization:
    return Linearization(x, lambda cotangent: (cotangent,))


def _repeat(groups: int) -> Callable[[Tensor], Linearization]:
    return lambda x: vjp(Call(torch.repeat_interleave, (x, groups, -3), {}, (0,)))


def masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores with a mask of attention: added, or -inf where a boolean one is False."""
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask

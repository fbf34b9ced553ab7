"""Rules of ops that multiply what carries relevance: elementwise products, matmul, einsum, division."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .activation import op_name
from .base import Call, Linearization
from .linear import Epsilon


@dataclass(frozen=True)
class Uniform(Epsilon):
    """The uniform rule for an op that is linear in each of n active operands: each gets an equal share.

    For ``z = x_1 * ... * x_n`` each factor receives ``R / n`` (AttnLRP, Prop. 3.2); for ``O = A B`` with both
    operands active ``G_A = 1/2 (sigma(O) G) B^T`` and ``G_B = 1/2 A^T (sigma(O) G)`` (AttnLRP, Prop. 3.3):
    the ordinary vector-Jacobian product to operand i times its share.

    A product of products counts its factors, so that ``(x_1 x_2) x_3`` and ``x_1 (x_2 x_3)`` mean the same
    (You et al. 2025, arXiv 2510.18810): ``shares[i]`` is the number of factors below operand i over that of
    all. Empty ``shares`` stand for equal ones. Shares sum to 1; a constant added by the op is booked as
    ``bias``.
    """

    shares: tuple[float, ...] = ()
    kinds: ClassVar[frozenset[str] | None] = frozenset({"product", "matmul"})

    @property
    def name(self) -> str:
        return "uniform"

    def linearize(self, call: Call) -> Linearization:
        return self._shared(Epsilon(self.epsilon, relative=self.relative).linearize(call), call)

    def linearize_many(self, call: Call) -> Linearization:
        return self._shared(Epsilon(self.epsilon, relative=self.relative).linearize_many(call), call)

    def _shared(self, step: Linearization, call: Call) -> Linearization:
        shares = self.shares or (1 / len(call.active),) * len(call.active)
        if set(shares) == {1.0}:
            return step
        if len(set(shares)) == 1 and op_name(call.op) == "mul":  # once for all operands, which are no smaller
            return Linearization(step.output, lambda cotangent: step.pullback(cotangent * shares[0]))
        return Linearization(
            step.output,
            lambda cotangent: tuple(
                None if g is None else g * share
                for g, share in zip(step.pullback(cotangent), shares, strict=True)
            ),
        )


@dataclass(frozen=True)
class FreezeDenominator(Epsilon):
    """``z = a / b`` with b a constant: the coefficient of a is ``G / b``, that of b is 0.

    All relevance goes to the numerator, as for the normalisers of attention weights and routers.
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"division"})

    @property
    def name(self) -> str:
        return "numerator"

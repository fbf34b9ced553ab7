"""The softmax rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import Call, Gradient, Linearization, check, vjp


@dataclass(frozen=True)
class SoftmaxTaylor(Gradient):
    """Deep Taylor decomposition of softmax with its bias: ``R_i = x_i (R_si - s_i sum_j R_sj)``.

    With ``R_s = s * G`` the coefficient of x is ``s * (G - sum(s * G))``, the ordinary vector-Jacobian
    product: no division, and masked entries (s = 0) get 0. Not conservative by nature; the rest is booked as
    ``remainder``.

    With a temperature T the coefficient is that of ``softmax(x / T)``: ``s_T (G - sum(s_T G)) / T`` with
    ``s_T = softmax(x / T)``. The forward stays the model's own.

    Shapes: as the softmax's input; the sum runs over the softmax's dimension. Cost: no product; one more
    softmax unless T is 1.

    Source: AttnLRP, Prop. 3.1, which is T = 1.

    Raises:
        CompositeError: the temperature is not above 0.
    """

    temperature: float = 1.0
    kinds: ClassVar[frozenset[str] | None] = frozenset({"softmax", "attention_weights"})

    def __post_init__(self) -> None:
        check(0 < self.temperature < math.inf, self, "temperature must be above 0, and finite")

    @property
    def name(self) -> str:
        return "softmax_taylor"

    def linearize(self, call: Call) -> Linearization:
        if self.temperature == 1:
            return vjp(call)
        softened = vjp(call.with_active([x / self.temperature for x in call.operands()]))
        return Linearization(
            call.run(),
            lambda cotangent: tuple(
                None if g is None else g / self.temperature for g in softened.pullback(cotangent)
            ),
        )

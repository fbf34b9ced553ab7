"""The softmax rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Gradient


@dataclass(frozen=True)
class SoftmaxTaylor(Gradient):
    """Deep Taylor decomposition of softmax with its bias: ``R_i = x_i (R_si - s_i sum_j R_sj)``.

    With ``R_s = s * G`` the coefficient of x is ``s * (G - sum(s * G))``, the ordinary vector-Jacobian
    product: no division, and masked entries (s = 0) get 0. Not conservative by nature; the rest is booked as
    ``remainder``.

    Shapes: as the softmax's input; the sum runs over the softmax's dimension.

    Source: AttnLRP, Prop. 3.1.
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"softmax", "attention_weights"})

    @property
    def name(self) -> str:
        return "softmax_taylor"

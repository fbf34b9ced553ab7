"""Rules that tell positive from negative contributions, at the price of one more product forward and back.

With ``A = op(|x|, |W|, |b|)`` the sum of all contributions' absolute values, bias included, the positive
ones sum to ``P = (z + A) / 2`` and the negative ones to ``N = (z - A) / 2``. Back, ``sum_j (x_i w_ij)+ c_j``
is ``1/2 x_i (W^T c)_i + 1/2 |x_i| (|W|^T c)_i``. Products run in the operands' own dtype, quotients in
float32 at least.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from . import affine
from .base import Call, Cotangent, Linearization, Rule, check, dot, wide
from .linear import Epsilon, ordinary, ordinary_many

#: Share of A up to which a sum of one sign counts as rounding, in units of the dtype's eps. z and A are
#: rounded by up to half an eps each when they are stored, and by some more while they are summed up.
_ROUNDING = 4


@dataclass(frozen=True)
class _SignSplit(Rule):
    """What the rules of this file share: which ops they take."""

    kinds: ClassVar[frozenset[str] | None] = frozenset({"linear", "conv"})

    def refusal(self, call: Call) -> str | None:
        return affine.refusal(call)

    def linearize(self, call: Call) -> Linearization:
        return self._split(call, ordinary)

    def linearize_many(self, call: Call) -> Linearization:
        return self._split(call, ordinary_many)

    @abc.abstractmethod
    def _split(self, call: Call, product: Callable[[Call], Linearization]) -> Linearization:
        """The rule, given how the op and the op on absolute values are pulled back."""


@dataclass(frozen=True)
class Gamma(_SignSplit):
    """The gamma rule, generalised to inputs and outputs of either sign; ``gamma=0`` is ``Epsilon(epsilon)``.

    Contributions ``x_i w_ij`` and ``b_j`` of the output's own sign count ``1 + gamma`` times: for z > 0
    ``R_i = sum_j (x_i w_ij + gamma (x_i w_ij)+) R_j / (z_j + gamma P_j + epsilon)``, for z < 0 the same with
    negative parts. In closed form, with ``A = |x| |W| + |b|`` and ``l = gamma / (2 + gamma)``:
    ``u = G |z| / (|z| + l A + 2 epsilon / (2 + gamma))``, and the coefficient of x is
    ``W^T u + l sign(x) |W|^T (sign(z) u)``. The denominator is 0 only where nothing contributes, so no
    stabiliser is needed. Where z = 0 nothing passes. What stays behind: the bias's part (``bias``) and the
    stabiliser's (``epsilon``).

    Shapes: z, A, u and G as the op's output, the coefficient as x. Cost: one more product forward, one back.

    Source: Montavon et al. 2019; for any signs Jafari et al. 2024 (MambaLRP) and Andéol et al. 2021. The form
    with absolute values is ours.

    Raises:
        CompositeError: gamma is below 0 or infinite, epsilon is below 0.
    """

    gamma: float = 0.25
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check(0 <= self.gamma < math.inf, self, "gamma must be 0 or more, and finite")
        check(self.epsilon >= 0, self, "epsilon must be 0 or more")

    def _split(self, call: Call, product: Callable[[Call], Linearization]) -> Linearization:
        if self.gamma == 0:
            plain = Epsilon(self.epsilon)
            return plain.linearize(call) if product is ordinary else plain.linearize_many(call)
        (x,) = call.operands()
        step, absolute = product(call), product(affine.magnitude(call))
        fraction = self._fraction(step.output, absolute.output)

        def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
            (signed,) = step.pullback((cotangent * fraction.abs()).to(cotangent.dtype))
            (unsigned,) = absolute.pullback((cotangent * fraction).to(cotangent.dtype))
            assert signed is not None and unsigned is not None
            return (torch.addcmul(signed, unsigned, x.sign(), value=self._weight),)

        return Linearization(step.output, pullback)

    @property
    def _weight(self) -> float:
        return self.gamma / (2 + self.gamma)

    def _fraction(self, output: Tensor, absolute: Tensor) -> Tensor:
        """``z / (|z| + l A + 2 epsilon / (2 + gamma))``, in [-1, 1], in float32 at least."""
        z = wide(output)
        floor = max(2 * self.epsilon / (2 + self.gamma), torch.finfo(z.dtype).tiny)
        # Not add(..., alpha=l): Inductor makes addmm of it with the product before, and loses alpha (2.13).
        return z / (z.abs() + self._weight * wide(absolute) + floor)

    def absorbed(
        self, call: Call, output: Tensor, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        if self.gamma == 0:
            return Epsilon(self.epsilon).absorbed(call, output, cotangent, coefficients)
        fraction = self._fraction(output, affine.magnitude(call).run())
        signed, bias = cotangent * fraction, _constant_part(call)
        booked = {"bias": dot(bias, cotangent * fraction.abs()) + self._weight * dot(bias.abs(), signed)}
        if self.epsilon:
            booked["epsilon"] = 2 * self.epsilon / (2 + self.gamma) * signed.double().sum()
        return booked


@dataclass(frozen=True)
class AlphaBeta(_SignSplit):
    """The alpha-beta rule: positive contributions share ``alpha R``, negative ones ``-beta R``.

    ``R_i = sum_j (alpha (x_i w_ij)+ / (P_j + epsilon) - beta (x_i w_ij)- / (N_j - epsilon)) R_j`` with
    alpha - beta = 1 and the bias in P or N. In closed form, with ``A = |x| |W| + |b|``,
    ``u = alpha z G / (A + z + 2 epsilon)`` and ``v = beta z G / (A - z + 2 epsilon)``, the coefficient of x
    is ``W^T (u + v) + sign(x) |W|^T (u - v)``.

    What stays behind: the bias's part (``bias``), the stabiliser's (``epsilon``), and the share of a sign
    that no contribution has (``empty``): where all are negative, P is 0 or the rounding of z and A, and
    nothing is divided by it.

    Shapes: z, A, u, v and G as the op's output, the coefficient as x.
    Cost: one more product forward, one back.

    Source: Bach et al. 2015, eq. 60. The form with absolute values is ours.

    Raises:
        CompositeError: alpha - beta is not 1, alpha or beta is below 0, epsilon is below 0.
    """

    alpha: float = 2.0
    beta: float = 1.0
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check(
            self.beta >= 0 and abs(self.alpha - self.beta - 1) <= 1e-9,
            self,
            "alpha - beta must be 1, with beta 0 or more, as in AlphaBeta(2, 1)",
        )
        check(self.epsilon >= 0, self, "epsilon must be 0 or more")

    @property
    def name(self) -> str:
        return "alpha_beta"

    def _split(self, call: Call, product: Callable[[Call], Linearization]) -> Linearization:
        (x,) = call.operands()
        step, absolute = product(call), product(affine.magnitude(call))
        z, size, rounding = self._sums(step.output, absolute.output)

        def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
            arrived = z * cotangent if self.alpha == 1 else self.alpha * z * cotangent
            first = second = self._share(arrived, size + z, rounding)
            if self.beta:
                negative, weight = self._share(arrived, size - z, rounding), self.beta / self.alpha
                first, second = (torch.add(first, negative, alpha=w) for w in (weight, -weight))
            (signed,) = step.pullback(first.to(cotangent.dtype))
            (unsigned,) = absolute.pullback(second.to(cotangent.dtype))
            assert signed is not None and unsigned is not None
            return (torch.addcmul(signed, unsigned, x.sign()),)

        return Linearization(step.output, pullback)

    @staticmethod
    def _sums(output: Tensor, absolute: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z and A in float32 at least, and up to where a sum of one sign is their rounding."""
        size = wide(absolute)
        return wide(output), size, _ROUNDING * torch.finfo(output.dtype).eps * size

    def _share(self, arrived: Tensor, part: Tensor, rounding: Tensor) -> Tensor:
        """``R / (part + 2 epsilon)``, 0 where the part is nothing but rounding."""
        stabilised = part + 2 * self.epsilon if self.epsilon else part
        return torch.where(part > rounding, arrived / stabilised, 0.0)

    def absorbed(
        self, call: Call, output: Tensor, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        z, size, rounding = self._sums(output, affine.magnitude(call).run())
        arrived, bias = z * cotangent, _constant_part(call)
        booked = dict.fromkeys(("bias", "epsilon", "empty"), torch.zeros((), dtype=torch.float64))
        for sign, weight in ((1, self.alpha), (-1, -self.beta)):
            part = size + sign * z
            share = 2 * weight * self._share(arrived, part, rounding)
            lost = torch.where(part > rounding, 0.0, weight * arrived)
            booked["bias"] = booked["bias"] + dot((sign * bias).clamp_min(0), share)
            booked["epsilon"] = booked["epsilon"] + self.epsilon * share.double().sum()
            booked["empty"] = booked["empty"] + lost.double().sum()
        return booked


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """The z+ rule: relevance to positive contributions alone, ``AlphaBeta(1, 0)``.

    ``R_i = sum_j (x_i w_ij)+ / (P_j + epsilon) R_j``: with ``A = |x| |W| + |b|`` and
    ``u = z G / (A + z + 2 epsilon)`` the coefficient of x is ``W^T u + sign(x) |W|^T u``. What stays behind:
    ``bias``, ``epsilon`` and ``empty`` as in :class:`AlphaBeta`.

    Shapes: z, A, u and G as the op's output, the coefficient as x. Cost: one more product forward, one back.

    Source: Montavon et al. 2017 (deep Taylor decomposition).
    """

    alpha: float = field(default=1.0, init=False, repr=False)
    beta: float = field(default=0.0, init=False, repr=False)

    @property
    def name(self) -> str:
        return "z_plus"


def _constant_part(call: Call) -> Tensor:
    """What the op adds, in the shape of its output."""
    constant: Tensor = call.with_active([torch.zeros_like(x) for x in call.operands()]).run()
    return constant

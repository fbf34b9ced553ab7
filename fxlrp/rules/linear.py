"""Rules of ops affine in what carries relevance: linear, conv, matmul with a constant, sums, reshapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .base import Call, Cotangent, Linearization, Rule, dot, vjp
from .stacked import vjp_many


def sigma(z: Tensor, epsilon: float) -> Tensor:
    """``|z| / (|z| + epsilon)``: what the stabiliser ``z + epsilon * sign(z)`` lets through, in [0, 1]."""
    magnitude = z.abs()
    return magnitude / (magnitude + epsilon)


def _is_plain_linear(call: Call) -> bool:
    """Whether this is PyTorch's own linear map of an active input by a constant real matrix."""
    if call.op is not torch.ops.aten.linear.default or call.active != (0,):
        return False
    weight = call.args[1]
    return bool(weight.dim() == 2 and not weight.is_complex())


def _linear(call: Call) -> Linearization:
    """``F.linear`` with constant weights: one matrix product back, whatever the strides, for any number of
    coefficients.
    """
    weight = call.args[1]

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        rows = torch.mm(cotangent.reshape(-1, cotangent.shape[-1]), weight)
        return (rows.reshape(*cotangent.shape[:-1], weight.shape[-1]),)

    return Linearization(call.run(), pullback)


@dataclass(frozen=True)
class Epsilon(Rule):
    """The epsilon rule; with ``epsilon=0`` LRP-0, the ordinary vector-Jacobian product.

    For ``z = W x + b``:  ``R_i = sum_j x_i W_ji R_j / (z_j + epsilon * sign(z_j))``, so that with
    ``sigma(z) = |z| / (|z| + epsilon)`` the coefficient of x is ``W^T (sigma(z) * G)``. It holds for every op
    that is affine in its active operands. What stays behind: the op's constant part ``z(0)`` times
    ``sigma(z) * G`` (``bias``), and ``sum((1 - sigma(z)) * z * G)`` (``epsilon``).

    Shapes: z and G as the op's output, the coefficient as the operand.

    Source: Bach et al. 2015, eq. 58; Achtibat et al. 2024 (AttnLRP), eq. 8.
    """

    epsilon: float = 0.0
    kinds: ClassVar[frozenset[str] | None] = frozenset({"linear", "conv", "add"})

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"Epsilon(epsilon={self.epsilon}): epsilon must be 0 or more.")

    def linearize(self, call: Call) -> Linearization:
        return self._damped(_linear(call) if _is_plain_linear(call) else vjp(call))

    def linearize_many(self, call: Call) -> Linearization:
        return self._damped(_linear(call) if _is_plain_linear(call) else vjp_many(call))

    def _damped(self, step: Linearization) -> Linearization:
        if self.epsilon == 0:
            return step
        return Linearization(step.output, lambda cotangent: step.pullback(self._damp(step.output, cotangent)))

    def _damp(self, output: Any, cotangent: Cotangent) -> Cotangent:
        if self.epsilon == 0:
            return cotangent
        return pytree.tree_map(
            lambda z, g: None if g is None else g * sigma(z, self.epsilon),
            output,
            cotangent,
            is_leaf=lambda leaf: leaf is None,
        )

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        constant = call.with_active([torch.zeros_like(x) for x in call.operands()]).run()
        passed = self._damp(output, cotangent)
        booked = {"bias": dot(constant, passed)}
        if self.epsilon:
            booked["epsilon"] = dot(output, cotangent) - dot(output, passed)
        return booked


@dataclass(frozen=True)
class Structural(Epsilon):
    """Views, permutations, concatenation, slicing, masking, scaling: relevance moves with its element.

    PyTorch's own vector-Jacobian product is already right. Constant elements that are mixed in (a class token
    that is concatenated, position embeddings that are added, values that are masked in) keep their part:
    ``constant``.
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"structural", "add"})

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        booked = super().absorbed(call, output, cotangent, coefficients)
        return {"constant": booked.pop("bias"), **booked}

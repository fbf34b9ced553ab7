"""Rules of ops affine in what carries relevance: linear, conv, matmul with a constant, sums, reshapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .activation import op_name
from .base import Call, Cotangent, Linearization, Rule, check, dot, vjp, wide
from .stacked import vjp_many


def sigma(z: Tensor, epsilon: float | Tensor) -> Tensor:
    """``|z| / (|z| + epsilon)``: what the stabiliser ``z + epsilon * sign(z)`` lets through, in [0, 1]; in
    float32 at least. Where z and epsilon are both 0 there is nothing to let through.
    """
    magnitude = wide(z.abs())
    least = torch.finfo(magnitude.dtype).tiny
    floor = epsilon.clamp_min(least) if isinstance(epsilon, Tensor) else max(epsilon, least)
    return magnitude / (magnitude + floor)


def deviation(call: Call, z: Tensor) -> Tensor:
    """The standard deviation of an output: over channels and space of each sample for convolutions, else over
    the last dimension, so that neither padding nor other rows or samples matter.
    """
    first = 1 - call.args[1].dim() if op_name(call.op).startswith("conv") else -1
    dims = list(range(first, 0)) if z.dim() else []
    magnitude = wide(z.abs() if z.is_complex() else z)
    centred = magnitude - magnitude.mean(dims, keepdim=True)
    # From a norm, which on a CPU takes a twentieth of the time of std.
    length = torch.linalg.vector_norm(centred, dim=dims, keepdim=True)
    found: Tensor = (length * length / math.prod(z.shape[first:])).sqrt()
    return found


def _is_plain_linear(call: Call) -> bool:
    """Whether this is PyTorch's own linear map of an active input by a constant real matrix."""
    if call.op is not torch.ops.aten.linear.default or call.active != (0,):
        return False
    weight = call.args[1]
    return bool(weight.dim() == 2 and not weight.is_complex())


def ordinary(call: Call) -> Linearization:
    """The ordinary vector-Jacobian product of an op that is affine in its active operands."""
    return _linear(call) if _is_plain_linear(call) else vjp(call)


def ordinary_many(call: Call) -> Linearization:
    """The same for K coefficients at once."""
    return _linear(call) if _is_plain_linear(call) else vjp_many(call)


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

    With ``relative``, epsilon counts in standard deviations of the output: over the last dimension for linear
    maps, products and sums, over channels and space of each sample for convolutions. They are constants for
    relevance.

    Shapes: z and G as the op's output, the coefficient as the operand. Cost: no further product.

    Source: Bach et al. 2015, eq. 58; Achtibat et al. 2024 (AttnLRP), eq. 8; relative: Montavon et al. 2019,
    whose epsilon is a quarter of the output's standard deviation.

    Raises:
        CompositeError: epsilon is below 0.
    """

    epsilon: float = 0.0
    relative: bool = field(default=False, kw_only=True)
    kinds: ClassVar[frozenset[str] | None] = frozenset({"linear", "conv", "add"})

    def __post_init__(self) -> None:
        check(self.epsilon >= 0, self, "epsilon must be 0 or more")

    def linearize(self, call: Call) -> Linearization:
        return self._damped(call, ordinary(call))

    def linearize_many(self, call: Call) -> Linearization:
        return self._damped(call, ordinary_many(call))

    def _damped(self, call: Call, step: Linearization) -> Linearization:
        if self.epsilon == 0:
            return step
        return Linearization(
            step.output, lambda cotangent: step.pullback(self._damp(call, step.output, cotangent))
        )

    def _damp(self, call: Call, output: Any, cotangent: Cotangent) -> Cotangent:
        if self.epsilon == 0:
            return cotangent

        def damped(z: Tensor, g: Tensor | None) -> Tensor | None:
            if g is None:
                return None
            epsilon = self.epsilon * deviation(call, z) if self.relative else self.epsilon
            return (g * sigma(z, epsilon)).to(g.dtype)

        return pytree.tree_map(damped, output, cotangent, is_leaf=lambda leaf: leaf is None)

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        constant = call.with_active([torch.zeros_like(x) for x in call.operands()]).run()
        passed = self._damp(call, output, cotangent)
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

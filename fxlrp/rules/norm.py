"""The LN-rule: normalisation is linear once its standard deviation is held fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .activation import op_name
from .base import Call, Cotangent, Linearization, Rule, check, dot, vjp, wide


@dataclass(frozen=True)
class NormRule(Rule):
    """The LN-rule for LayerNorm, RMSNorm and GroupNorm: 1/std is a constant, the mean is not.

    LayerNorm ``z = w * C x * rstd + b`` with the centring C, gives ``C(w * G) * rstd``; RMSNorm
    ``z = w * x * rrms`` gives ``w * G * rrms``. The bias keeps ``sum(b * G)`` (``bias``); nothing else is
    absorbed.

    Shapes: x, z, G and the coefficient are equal; rstd is 1 in the normalised dimensions.

    Source: Ali et al. 2022, eq. 13 (LN-rule); AttnLRP, Prop. 3.4.
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"norm"})

    @property
    def name(self) -> str:
        return "ln_rule"

    def linearize(self, call: Call) -> Linearization:
        return _FORMS[op_name(call.op)](call)

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        position = {"layer_norm": 3, "group_norm": 3}.get(op_name(call.op))
        bias = None if position is None else _argument(call, position, "bias")
        if bias is None:
            return {}
        if op_name(call.op) == "group_norm":
            bias = bias.view(-1, *(1,) * (cotangent.dim() - 2))
        return {"bias": dot(bias.expand_as(cotangent), cotangent)}


@dataclass(frozen=True)
class IdentityNorm(NormRule):
    """The identity rule for normalisation: ``R_x = R_z``, so that neither the bias nor the mean keeps any.

    With ``R_z = z * G`` the coefficient of x is ``z G / (x + epsilon sign(x))``, sign(0) = +1, in float32 at
    least; the stabiliser keeps ``sum(R_z epsilon / (|x| + epsilon))`` (``epsilon``). Coefficients grow as x
    gets small, so float16 may overflow. Of a norm that the model writes out, this is the step ``x * 1/std``
    alone.

    Shapes: x, z, G and the coefficient are equal. Cost: no product.

    Source: AttnLRP, Prop. 3.4: the identity rule, with all of the relevance that arrives at z.

    Raises:
        CompositeError: epsilon is not above 0, although an x of 0 would be divided by.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check(0 < self.epsilon < math.inf, self, "epsilon must be above 0, since an x of 0 is divided by it")

    @property
    def name(self) -> str:
        return "identity_norm"

    def linearize(self, call: Call) -> Linearization:
        (x,) = call.operands()
        output = call.run()

        def pullback(cotangent: Tensor) -> tuple[Tensor]:
            value = wide(x)
            stabilised = torch.where(value < 0, value - self.epsilon, value + self.epsilon)
            return ((wide(output) * cotangent / stabilised).to(x.dtype),)

        return Linearization(output, pullback)

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        (x,) = call.operands()
        return {"epsilon": dot(output * self.epsilon / (wide(x).abs() + self.epsilon), cotangent)}


def _argument(call: Call, position: int, name: str) -> Any:
    return call.args[position] if len(call.args) > position else call.kwargs.get(name)


def _layer_norm(call: Call) -> Linearization:
    x, shape = call.args[:2]
    weight = _argument(call, 2, "weight")
    eps = _argument(call, 4, "eps")
    output, _, rstd = torch.ops.aten.native_layer_norm.default(
        x, shape, weight, _argument(call, 3, "bias"), 1e-5 if eps is None else eps
    )
    dims = tuple(range(-len(shape), 0))

    def pullback(cotangent: Tensor) -> tuple[Tensor]:
        # In float32 at least: the mean is a sum of what nearly cancels.
        scaled = wide(cotangent) if weight is None else wide(cotangent) * weight
        # (scaled - mean) * rstd, in one pass over the rows.
        return (torch.addcmul(scaled.mean(dims, keepdim=True) * -rstd, scaled, rstd).to(x.dtype),)

    return Linearization(output, pullback)


def _native_rms_norm(call: Call) -> Linearization:
    x, shape = call.args[:2]
    weight, eps = _argument(call, 2, "weight"), _argument(call, 3, "eps")
    dims = tuple(range(-len(shape), 0))

    def pullback(cotangent: Tensor) -> tuple[Tensor]:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        floor = torch.finfo(wide.dtype).eps if eps is None else eps
        rrms = torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + floor)
        scaled = cotangent if weight is None else cotangent * weight
        return ((scaled * rrms).to(x.dtype),)

    return Linearization(call.run(), pullback)


def _group_norm(call: Call) -> Linearization:
    x, groups = call.args[:2]
    weight = _argument(call, 2, "weight")
    eps = _argument(call, 4, "eps")

    def pullback(cotangent: Tensor) -> tuple[Tensor]:
        scaled = wide(cotangent)
        if weight is not None:
            scaled = scaled * weight.view(-1, *(1,) * (x.dim() - 2))
        inside = (x.shape[0], groups, math.prod(x.shape[1:]) // groups)
        rows, values = scaled.reshape(inside), wide(x).reshape(inside)
        rstd = torch.rsqrt(values.var(-1, correction=0, keepdim=True) + (1e-5 if eps is None else eps))
        return (((rows - rows.mean(-1, keepdim=True)) * rstd).reshape(x.shape).to(x.dtype),)

    return Linearization(call.run(), pullback)


_FORMS = {
    "layer_norm": _layer_norm,
    "rms_norm": _native_rms_norm,
    "group_norm": _group_norm,
    # The canonical form x * factor: the factor is not an active operand, so the plain product is the rule.
    "normalize": vjp,
    "normalize_divide": vjp,
}

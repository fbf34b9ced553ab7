"""The identity rule for activations, in closed form: no division by activations anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Call, Linearization, Rule, vjp

#: |x| below which f(x)/x is replaced by its series, whose next term is below float64's rounding.
_SMALL = 1e-4


def _series(x: Tensor, exact: Callable[[Tensor], Tensor], near_zero: Tensor) -> Tensor:
    """``exact(x)`` away from 0 and its series near 0; the branch not taken sees 1 and stays finite."""
    small = x.abs() < _SMALL
    return torch.where(small, near_zero, exact(torch.where(small, 1.0, x)))


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return 0.5 * (1.0 + _bend(x, approximate=approximate))


def _bend(x: Tensor, *, approximate: str = "none") -> Tensor:
    """What GELU's ratio ``(1 + bend)/2`` bends by."""
    if approximate == "tanh":
        return torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))
    return torch.erf(x * math.sqrt(0.5))


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    negative = torch.where(x > 0, -1.0, x)
    below = _series(
        negative,
        lambda t: torch.expm1(t * input_scale) / t,
        input_scale * (1.0 + 0.5 * negative * input_scale + (negative * input_scale) ** 2 / 6.0),
    )
    return torch.where(x > 0, scale, scale * alpha * below)


def _selu(x: Tensor) -> Tensor:
    return _elu(x, 1.6732632423543772, 1.0507009873554805)


def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return _elu(x, alpha, 1.0, 1.0 / alpha)


def _clamp(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    # A bound that is itself 0 cuts its side off, as ReLU does; at 0 the side below counts.
    above = 1.0 if high is None or high > 0 else 0.0
    below = 1.0 if low is None or low < 0 else 0.0
    near_zero = torch.full_like(x, below).masked_fill(x > 0, above)
    return _series(x, lambda t: torch.clamp(t, low, high) / t, near_zero)


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return _clamp(x, min_val, max_val)


def _power(x: Tensor, exponent: Any) -> Tensor:
    return torch.pow(x, exponent - 1)


#: f(x)/x of every elementwise f with f(0)=0, by op name; arguments after x are the op's own.
RATIOS: dict[str, Callable[..., Tensor]] = {
    "relu": _step,
    "silu": torch.sigmoid,
    "gelu": _gelu,
    "tanh": lambda x: _series(x, lambda t: torch.tanh(t) / t, 1.0 - x * x / 3.0),
    "erf": lambda x: _series(x, lambda t: torch.erf(t) / t, (1.0 - x * x / 3.0) * (2.0 / math.sqrt(math.pi))),
    "sin": lambda x: _series(x, lambda t: torch.sin(t) / t, 1.0 - x * x / 6.0),
    "expm1": lambda x: _series(x, lambda t: torch.expm1(t) / t, 1.0 + 0.5 * x + x * x / 6.0),
    "log1p": lambda x: _series(x, lambda t: torch.log1p(t) / t, 1.0 - 0.5 * x + x * x / 3.0),
    "leaky_relu": lambda x, slope=0.01: torch.ones_like(x).masked_fill(x <= 0, slope),
    "prelu": lambda x, weight: torch.where(x > 0, 1.0, -F.prelu(-torch.ones_like(x), weight.to(x.dtype))),
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "mish": lambda x: torch.tanh(F.softplus(x)),
    "hardswish": lambda x: F.relu6(x + 3.0) / 6.0,
    "hardtanh": _hardtanh,
    "relu6": lambda x: _clamp(x, 0.0, 6.0),
    "softsign": lambda x: 1.0 / (1.0 + x.abs()),
    "abs": torch.sign,
    "square": lambda x: x,
    "pow": _power,
}


@dataclass(frozen=True)
class Identity(Rule):
    """The identity rule: an elementwise activation hands its relevance on unchanged.

    For f with f(0)=0, ``R_x = R_z`` means the coefficient ``G * f(x)/x``, which is taken in closed form: SiLU
    gives ``sigmoid(x)``, GELU ``Phi(x)``, ReLU its step, ``x * g(x)`` gives ``g(x)``; elsewhere a series near
    0. Nothing is absorbed.

    Shapes: x, z, G and the coefficient are equal.

    Source: AttnLRP, eq. 9.
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"activation"})

    def refusal(self, call: Call) -> str | None:
        if op_name(call.op) in (*RATIOS, "self_gate"):
            return None
        name = op_name(call.op)
        return f"it needs f(x)/x in closed form, and fxlrp/rules/activation.py has no row for '{name}'"

    def linearize(self, call: Call) -> Linearization:
        if op_name(call.op) == "self_gate":  # x * g(x): the gate is not among the active operands
            return vjp(call)
        ratio = RATIOS[op_name(call.op)]
        (x,) = call.operands()
        output = call.run()

        def pullback(cotangent: Any) -> tuple[Tensor]:
            # In float32 at least: x*x and erf lose too much in half precision, and nothing of this is kept.
            wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            if ratio is _gelu and wide is x:  # G (1 + bend)/2 in fewer passes over memory
                half = cotangent * 0.5
                return (torch.addcmul(half, half, _bend(x, **call.kwargs)),)
            return (cotangent * ratio(wide, *call.args[1:], **call.kwargs).to(x.dtype),)

        return Linearization(output, pullback)


def op_name(op: Any) -> str:
    """An op's name without namespace, overload and the underscores of internal variants."""
    packet = getattr(op, "overloadpacket", op)
    name: str = getattr(packet, "__name__", str(packet))
    return name.split("::")[-1].split(".")[0].strip("_")

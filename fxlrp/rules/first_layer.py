"""Rules for the layer that reads the explained input: relevance there is no product with the input's value.

Their pullbacks return relevance and no coefficient (``direct``). Between such a layer and the input only
steps may lie that move elements or shift and rescale each by itself; see :mod:`fxlrp.rules.carry`. Where no
contribution can take an output's relevance it stays behind (``empty``); biases take none.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import affine
from .activation import op_name
from .base import Call, Cotangent, Linearization, Rule, check, wide
from .linear import ordinary, ordinary_many

#: Share of the largest possible denominator that counts as its rounding, in units of the dtype's eps.
_ROUNDING = 4
#: How a product is pulled back: of one coefficient or of K.
_Product = Callable[[Call], Linearization]


@dataclass(frozen=True)
class _FirstLayer(Rule):
    """Relevance by parts ``R_i = sum_j parts_ij R_j / total_j``."""

    direct: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str] | None] = frozenset({"linear", "conv"})

    def refusal(self, call: Call) -> str | None:
        return affine.refusal(call)

    @abc.abstractmethod
    def _parts(self, call: Call, product: _Product) -> tuple[Tensor, Tensor, Linearization]:
        """Totals by output, where they are there, and the map from ``R / total`` to relevance."""

    def linearize(self, call: Call) -> Linearization:
        return self._shared(call, ordinary)

    def linearize_many(self, call: Call) -> Linearization:
        return self._shared(call, ordinary_many)

    def _shared(self, call: Call, product: _Product) -> Linearization:
        output = call.run()
        total, there, parts = self._parts(call, product)

        def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
            share = torch.where(there, wide(output) * cotangent / total, 0.0)
            return parts.pullback(share.to(cotangent.dtype))

        return Linearization(output, pullback)

    def absorbed(
        self, call: Call, output: Tensor, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        _, there, _ = self._parts(call, ordinary)
        return {"empty": torch.where(there, 0.0, output.double() * cotangent.double()).sum()}


@dataclass(frozen=True)
class Box(_FirstLayer):
    """The box rule z^B, for inputs that lie in a box, such as pixels.

    ``R_i = sum_j (x_i w_ij - l_i w_ij+ - h_i w_ij-) R_j / (sum_i' of the same)``. With the box's middle
    ``m = (l + h) / 2`` and half-width ``d = (h - l) / 2`` the numerator is
    ``(x_i - m_i) w_ij + d_i |w_ij|``, so that with ``c = R / ((x - m) W + d |W|)`` relevance is
    ``(x - m) W^T c + d |W|^T c``.

    Args:
        low: least value of all inputs, or one for each channel: dimension 1 of a convolution's input, the
            last one of a linear layer's. It is that of the tensor that the layer reads, after normalisation:
            for pixels ``(0 - mean) / std``.
        high: greatest value, likewise.

    Shapes: z, G and c as the op's output, relevance as x. Cost: two more products forward, one back.

    Source: Montavon et al. 2017 (deep Taylor decomposition), z^B-rule.

    Raises:
        CompositeError: low is above high, or they are not of one length.
    """

    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    def __post_init__(self) -> None:
        for bound in ("low", "high"):  # lists too; a rule is a value and holds none
            given = getattr(self, bound)
            object.__setattr__(self, bound, tuple(given) if isinstance(given, Sequence) else given)
        low, high = _each(self.low), _each(self.high)
        lengths = {len(b) for b in (self.low, self.high) if isinstance(b, tuple)}
        check(len(lengths) <= 1, self, "low and high must have one number, or as many as the other")
        length = max(lengths, default=1)
        pairs = zip(low * (length // len(low)), high * (length // len(high)), strict=True)
        check(all(-math.inf < a <= b < math.inf for a, b in pairs), self, "low must not be above high")

    def refusal(self, call: Call) -> str | None:
        reason = affine.refusal(call)
        lengths = {len(b) for b in (self.low, self.high) if isinstance(b, tuple)}
        if reason or not lengths:
            return reason
        if call.active != (0,) or not (op_name(call.op) in _CHANNEL_LAST or _is_conv(call)):
            return f"'{op_name(call.op)}' has no channels that bounds could be for; give one number each"
        channels, (length,) = call.args[0].shape[_channel(call)], lengths
        return None if channels == length else f"it has {length} bounds for {channels} channels"

    def _parts(self, call: Call, product: _Product) -> tuple[Tensor, Tensor, Linearization]:
        (x,) = call.operands()
        low, high = (_bound(call, x, bound) for bound in (self.low, self.high))
        offset, width = x - (low + high) / 2, ((high - low) / 2) + torch.zeros_like(x)
        centred = product(affine.changed(call, lambda _: offset, affine.same, affine.zeros))
        spread = product(affine.changed(call, lambda _: width, abs, affine.zeros))
        largest = wide(spread.output)
        total = wide(centred.output) + largest

        def pullback(share: Cotangent) -> tuple[Tensor | None, ...]:
            (signed,), (unsigned,) = centred.pullback(share), spread.pullback(share)
            assert signed is not None and unsigned is not None
            return (offset * signed + width * unsigned,)

        there = total.abs() > _ROUNDING * torch.finfo(x.dtype).eps * largest
        return total, there, Linearization(None, pullback)


@dataclass(frozen=True)
class Flat(_FirstLayer):
    """The flat rule: an output's relevance in equal parts to all inputs that reach it, whatever they hold.

    ``R_i = sum_j R_j / N_j`` over the outputs j that input i reaches, N_j the number of inputs that reach j;
    padding is none.

    Shapes: z, G and N as the op's output, relevance as x. Cost: one more product forward, none back.

    Source: Lapuschkin et al. 2019 (Unmasking Clever Hans predictors), supplement; Bach et al. 2016.
    """

    def _parts(self, call: Call, product: _Product) -> tuple[Tensor, Tensor, Linearization]:
        return _by_weight(affine.changed(call, affine.ones, affine.ones, affine.zeros), product)


@dataclass(frozen=True)
class WSquare(_FirstLayer):
    """The w^2 rule, for inputs that may be any real number: ``R_i = sum_j w_ij^2 R_j / sum_i' w_i'j^2``.

    The bias takes no part, as in the paper, where relevance is conserved.

    Shapes: z and G as the op's output, relevance as x. Cost: one more product forward, none back.

    Source: Montavon et al. 2017 (deep Taylor decomposition), w^2-rule.
    """

    @property
    def name(self) -> str:
        return "w_square"

    def _parts(self, call: Call, product: _Product) -> tuple[Tensor, Tensor, Linearization]:
        return _by_weight(affine.changed(call, affine.ones, affine.square, affine.zeros), product)


def _by_weight(call: Call, product: _Product) -> tuple[Tensor, Tensor, Linearization]:
    parts = product(call)
    total = wide(parts.output)
    return total, total != 0, parts


#: Ops whose first operand has its channels last.
_CHANNEL_LAST = ("linear", "matmul", "mm", "bmm", "grouped_mm", "grouped_mm_fallback")


def _is_conv(call: Call) -> bool:
    return op_name(call.op).startswith("conv")


def _channel(call: Call) -> int:
    return 1 - call.args[1].dim() if _is_conv(call) else -1


def _each(bound: float | tuple[float, ...]) -> tuple[float, ...]:
    return bound if isinstance(bound, tuple) else (bound,)


def _bound(call: Call, x: Tensor, bound: float | tuple[float, ...]) -> float | Tensor:
    """A bound to compute with; built from numbers, since a tensor would be a constant of the graph."""
    if not isinstance(bound, tuple):
        return bound
    values = torch.stack([x.new_full((), number) for number in bound])
    return values.view(-1, *(1,) * (-1 - _channel(call)))

"""Rules of the attention op ``softmax(scale * q k^T + mask) v``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Call, Cotangent, Linearization, Rule, check, dot, remainder, vjp
from .batched_attention import attention_of_many
from .product import Uniform
from .softmax import SoftmaxTaylor
from .transposed_attention import attention_of_values
from .written import Written


@dataclass(frozen=True)
class _Attention(Rule):
    """What the rules of this op share: who gets which part, and what the scores' part leaves over."""

    kinds: ClassVar[frozenset[str] | None] = frozenset({"attention"})

    @staticmethod
    def shares(call: Call) -> tuple[float, ...]:
        """What part of an output's relevance each active operand gets."""
        value_active = _VALUE in call.active
        scores = [i for i in call.active if i != _VALUE]
        outer = 0.5 if value_active and scores else 1.0
        return tuple(outer if i == _VALUE else outer / len(scores) for i in call.active)

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        if call.active == (_VALUE,):
            return {}
        # The value's share must conserve by itself; only the scores' share may leave a Taylor remainder.
        # Booking the whole difference would hide an error in the value's share.
        by_leaf = dict(zip(call.active, coefficients, strict=True))
        shares = dict(zip(call.active, self.shares(call), strict=True))
        scores = dot(output, cotangent) * (1 - shares.get(_VALUE, 0.0))
        for i in call.active:
            if i != _VALUE and by_leaf[i] is not None:
                scores = scores - dot(call.leaves()[i], by_leaf[i])
        return {"remainder": scores}


@dataclass(frozen=True)
class AttentionRule(_Attention):
    """AttnLRP's attention: the ordinary backward with q and k times 1/4 and v times 1/2.

    The composition of the uniform rule for ``A v`` (1/2 each), the softmax rule, and the uniform rule for
    ``q k^T`` (1/2 each), so any fused attention backward will do and no N x N matrix is needed. An operand
    that carries no relevance leaves its share to the other one. What the softmax's Taylor step leaves over is
    ``remainder``.

    With stabilisers or a temperature attention is written out, N x N matrices included, and the three rules
    are composed step by step: ``Uniform(epsilon)`` for ``A v``, ``SoftmaxTaylor(temperature)``,
    ``Uniform(score_epsilon)`` for ``q k^T`` before it is scaled. The forward stays the op's own.

    Shapes: q ``[batch, heads, queries, d]``, k ``[batch, heads, keys, d]``, v ``[batch, heads, keys, e]``.
    Cost: by default that of the ordinary backward; written out two more products forward.

    Source: AttnLRP, Prop. 3.1 and 3.3.

    Raises:
        CompositeError: a stabiliser is below 0, or the temperature is not above 0.
    """

    epsilon: float = 0.0
    score_epsilon: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check(self.epsilon >= 0 and self.score_epsilon >= 0, self, "stabilisers must be 0 or more")
        check(0 < self.temperature < math.inf, self, "temperature must be above 0, and finite")

    @property
    def name(self) -> str:
        return "attention"

    def linearize(self, call: Call) -> Linearization:
        if self._is_written_out:
            written = self._write_out(call)

            def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
                found = written.pullback(cotangent)
                return tuple(found.get(i) for i in call.active)

            return Linearization(call.run(), pullback)
        return self._shared(vjp(call), call)

    def linearize_many(self, call: Call) -> Linearization:
        if self._is_written_out:
            return super().linearize_many(call)
        return self._shared(attention_of_many(call), call)

    def _shared(self, step: Linearization, call: Call) -> Linearization:
        shares = self.shares(call)
        return Linearization(
            step.output,
            lambda cotangent: tuple(
                None if g is None else g * share
                for g, share in zip(step.pullback(cotangent), shares, strict=True)
            ),
        )

    @property
    def _is_written_out(self) -> bool:
        return (self.epsilon, self.score_epsilon, self.temperature) != (0.0, 0.0, 1.0)

    def _write_out(self, call: Call) -> Written:
        return Written.of(
            call, Uniform(self.score_epsilon), SoftmaxTaylor(self.temperature), Uniform(self.epsilon)
        )

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        if self._is_written_out:
            return self._write_out(call).absorbed(cotangent)
        return super().absorbed(call, output, cotangent, coefficients)


@dataclass(frozen=True)
class FrozenAttention(_Attention):
    """Attention weights as constants: all relevance to the values, ``G_v = A^T G``.

    Cost: on a CPU two matrix products, as forward (:func:`attention_of_values`); elsewhere that of the
    ordinary backward.

    Source: Ali et al. 2022 (AH-rule); CP-LRP in AttnLRP, section 2.
    """

    @property
    def name(self) -> str:
        return "frozen_attention"

    def linearize(self, call: Call) -> Linearization:
        return self._of_values(attention_of_values, call)

    def linearize_many(self, call: Call) -> Linearization:
        return self._of_values(attention_of_many, call)

    @staticmethod
    def _of_values(linearized: Callable[[Call], Linearization], call: Call) -> Linearization:
        values = Call(call.op, call.args, call.kwargs, (_VALUE,)) if _VALUE in call.active else None
        if values is None:
            return Linearization(call.run(), lambda cotangent: (None,) * len(call.active))
        step = linearized(values)
        return Linearization(
            step.output,
            lambda cotangent: tuple(
                step.pullback(cotangent)[0] if i == _VALUE else None for i in call.active
            ),
        )


@dataclass(frozen=True)
class GradientAttention(_Attention):
    """The ordinary backward of attention; see :class:`fxlrp.rules.Gradient`."""

    @property
    def name(self) -> str:
        return "gradient"

    def linearize(self, call: Call) -> Linearization:
        return vjp(call)

    def linearize_many(self, call: Call) -> Linearization:
        return attention_of_many(call)

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        return {"remainder": remainder(call, output, cotangent, coefficients)}


#: Position of v among the operands of the attention op.
_VALUE = 2

"""What a rule is: a modified vector-Jacobian product of one op.

Every tensor ``a`` of the graph carries a coefficient ``G`` of its own shape, and its relevance is
``R = a * G`` (elementwise). A rule takes an op's operands and returns the op's own output together with a
*pullback*: the map from the coefficient of the output to the coefficients of the operands that carry
relevance. Rules are plain functions of tensors; the compiler runs them on fake tensors to build the relevance
graph, and the ledger on real ones.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import CompositeError

#: Coefficient(s) of an op's output: one tensor, or one per output of the op (None where none arrives).
Cotangent = Any
#: Maps the coefficient of the output to the coefficients of the active operands, in their order.
Pullback = Callable[[Cotangent], tuple["Tensor | None", ...]]


#: Magnitude from which on a finite number stands for infinity, as the least one of a dtype does in masks.
_INFINITE = 1e30


@dataclass(frozen=True, eq=False)
class Call:
    """An op applied to operands.

    Attributes:
        op: any callable of ``args`` and ``kwargs``: an ATen overload or a canonical op.
        args: positional operands.
        kwargs: named operands.
        active: which leaves of ``(args, kwargs)``, in pytree order, carry relevance.
    """

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    active: tuple[int, ...]

    def leaves(self) -> list[Any]:
        """All leaves of ``(args, kwargs)`` in pytree order."""
        return pytree.tree_leaves((self.args, dict(self.kwargs)))

    def operands(self) -> tuple[Tensor, ...]:
        """The active operands."""
        leaves = self.leaves()
        return tuple(leaves[i] for i in self.active)

    def with_active(self, tensors: Sequence[Tensor]) -> Call:
        """The same call with other tensors in the places of the active operands."""
        leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        for i, tensor in zip(self.active, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return Call(self.op, args, kwargs, self.active)

    def run(self) -> Any:
        """The op's output."""
        return self.op(*self.args, **self.kwargs)


@dataclass(frozen=True, eq=False)
class Linearization:
    """An op's output and the pullback of its coefficient at this point."""

    output: Any
    pullback: Pullback


class Rule(abc.ABC):
    """A rule of layer-wise relevance propagation, as a frozen value.

    Subclasses are frozen dataclasses. ``linearize`` says what the rule does, ``absorbed`` what the rule keeps
    back: for every rule and every coefficient G of an output z,
    ``sum(z * G) = sum_i sum(x_i * G_i) + sum(absorbed)`` holds to float precision.
    """

    #: A rule that lets nothing through: what it is assigned to counts as a constant for everything behind it.
    freezes: ClassVar[bool] = False
    #: A rule whose pullback returns relevance of its operand instead of a coefficient: that of an explained
    #: input where relevance is no product with the input's value (a pixel of 0 may get some).
    direct: ClassVar[bool] = False
    #: Kinds of ops that the rule is defined for; None for all.
    kinds: ClassVar[frozenset[str] | None] = None

    @abc.abstractmethod
    def linearize(self, call: Call) -> Linearization:
        """Run the op and return its output with the pullback of this rule."""

    def linearize_many(self, call: Call) -> Linearization:
        """The same with a pullback of K coefficients at once: ``[K, *shape]`` in and out.

        By default ``linearize``'s pullback under ``torch.vmap``: whatever it computes of values alone is
        computed once.
        """
        step = self.linearize(call)
        return Linearization(step.output, many(step.pullback))

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        """Relevance that stays behind at this node, by cause; float64 scalars. Nothing by default."""
        return {}

    def refusal(self, call: Call) -> str | None:
        """Why the rule cannot serve an op of one of its kinds, asked before anything is computed; None where
        it can. ``call`` holds fake tensors: ops, shapes and dtypes are known, values are not.
        """
        return None

    @property
    def name(self) -> str:
        """How plans and rule graphs call this rule."""
        return type(self).__name__.lower()


def vjp(call: Call) -> Linearization:
    """The ordinary vector-Jacobian product of an op with respect to its active operands."""
    inputs = [x.detach().requires_grad_(True) for x in call.operands()]
    with torch.enable_grad():
        output = call.with_active(inputs).run()
    outputs, spec = pytree.tree_flatten(output)

    def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        return pulled(outputs, inputs, cotangent)

    detached = [z.detach() if isinstance(z, Tensor) else z for z in outputs]
    return Linearization(pytree.tree_unflatten(detached, spec), pullback)


def pulled(
    outputs: Sequence[Any], inputs: Sequence[Tensor], cotangent: Cotangent
) -> tuple[Tensor | None, ...]:
    """Autograd's coefficients of the inputs from those of the outputs, flat or as their tree."""
    pairs = [
        (z, g)
        for z, g in zip(outputs, pytree.tree_leaves(cotangent, is_leaf=_is_none), strict=True)
        if g is not None and isinstance(z, Tensor) and z.requires_grad
    ]
    if not pairs:
        return (None,) * len(inputs)
    zs, gs = zip(*pairs, strict=True)
    # Where autograd is on the pullback is itself differentiated: its transpose pushes tangents forward.
    return torch.autograd.grad(
        zs, inputs, gs, allow_unused=True, retain_graph=True, create_graph=torch.is_grad_enabled()
    )


def linearized_many(rule: Rule, call: Call) -> Linearization:
    """A rule with a pullback of K coefficients; a class that has a ``linearize`` of its own and takes over
    another's ``linearize_many`` gets the one that follows from its own.
    """
    single, batched = (
        next(i for i, kind in enumerate(type(rule).__mro__) if method in vars(kind))
        for method in ("linearize", "linearize_many")
    )
    return rule.linearize_many(call) if batched <= single else Rule.linearize_many(rule, call)


def many(pullback: Pullback) -> Pullback:
    """A pullback of K coefficients at once, ``[K, *shape]`` each, from one of single ones."""

    def pull(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
        leaves, spec = pytree.tree_flatten(cotangent, is_leaf=_is_none)
        arrived: list[bool] = []

        def one(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            tree = pytree.tree_unflatten([None if g is None else next(given) for g in leaves], spec)
            found = pullback(tree)
            arrived[:] = [g is not None for g in found]
            return tuple(g for g in found if g is not None)

        coefficients = iter(torch.vmap(one)(*(g for g in leaves if g is not None)))
        return tuple(next(coefficients) if there else None for there in arrived)

    return pull


def wide(x: Tensor) -> Tensor:
    """A tensor in float32 where it is in half precision: ratios lose too much there."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def check(holds: bool, rule: Rule, says: str) -> None:
    """Refuse a rule with impossible parameters, when it is made.

    Raises:
        CompositeError: with what is allowed.
    """
    if not holds:
        raise CompositeError(f"{rule!r}: {says}.")


def dot(value: Any, coefficient: Cotangent) -> Tensor:
    """``sum(value * coefficient)`` in float64 over tensors or matching trees; the real part if complex."""
    total = torch.zeros((), dtype=torch.float64)
    leaves = zip(
        pytree.tree_leaves(value, is_leaf=_is_none),
        pytree.tree_leaves(coefficient, is_leaf=_is_none),
        strict=True,
    )
    for z, g in leaves:
        if g is None or not isinstance(z, Tensor):
            continue
        # A coefficient of exactly 0: nothing arrives, whatever the value. 0 * inf must not become NaN.
        # What stands for infinity in a mask has no relevance: times a coefficient's rounding it would drown
        # all else where a whole row is masked.
        if z.is_complex():
            z, g = torch.view_as_real(z), torch.view_as_real(g.resolve_conj())
        product = torch.where((g == 0) | (z.abs() >= _INFINITE), 0.0, z.double() * g.double())
        total = total + product.sum().to(total.device)
    return total


def remainder(call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]) -> Tensor:
    """What a first-order step leaves over: ``sum(z * G) - sum_i sum(x_i * G_i)``."""
    return dot(output, cotangent) - sum(
        (dot(x, g) for x, g in zip(call.operands(), coefficients, strict=True) if g is not None),
        start=torch.zeros((), dtype=torch.float64),
    )


def _is_none(value: Any) -> bool:
    return value is None


@dataclass(frozen=True)
class Gradient(Rule):
    """The vector-Jacobian product of any differentiable op: Gradient x Input where nothing else is used.

    For a function f at x this is the first-order Taylor step ``R_x = x * f'(x) * G``; what it leaves over,
    ``sum(f(x) * G) - sum(x * f'(x) * G)``, is booked as ``remainder``. For ops that are affine or homogeneous
    of degree 1 (max, top-k, ReLU) the remainder is their constant part or 0.
    """

    def linearize(self, call: Call) -> Linearization:
        return vjp(call)

    def linearize_many(self, call: Call) -> Linearization:
        from .stacked import vjp_many  # which is made of what this module defines

        return vjp_many(call)

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        return {"remainder": remainder(call, output, cotangent, coefficients)}


@dataclass(frozen=True)
class Taylor(Gradient):
    """A first-order Taylor step at a nonlinear op without a rule of its own; see :class:`Gradient`."""


@dataclass(frozen=True)
class WinnerTakesAll(Gradient):
    """All relevance to the chosen element: max, top-k, pooling, selection by data (Bach et al. 2015)."""

    @property
    def name(self) -> str:
        return "winner"


@dataclass(frozen=True)
class Freeze(Rule):
    """The output counts as a constant: CP-LRP's attention weights and gates, Ali et al. 2022's AH-rule.

    The coefficient of every operand is 0. A product with a frozen factor is linear in the other one, so
    nothing is lost there; relevance that arrives at the frozen output itself is booked as ``frozen``.
    """

    freezes: ClassVar[bool] = True

    def linearize(self, call: Call) -> Linearization:
        return Linearization(call.run(), lambda cotangent: (None,) * len(call.active))

    def absorbed(
        self, call: Call, output: Any, cotangent: Cotangent, coefficients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        return {"frozen": dot(output, cotangent)}

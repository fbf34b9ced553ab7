"""Pairs of rule nodes that one kernel computes: activation and product, residual sum and norm."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..kernels import gate, norm
from ..rules import Rule
from ..rules.activation import Identity, op_name
from ..rules.base import Call, Cotangent, Linearization
from ..rules.linear import Epsilon, Structural
from ..rules.norm import NormRule
from ..rules.product import Uniform
from .graphs import arg, computing, fake_mode, tree, value
from .rewrite import RuleOp, is_rule, rule_op
from .served import activation_name, norm_arguments, norm_refusal


@dataclass(frozen=True, eq=False)
class Pair:
    """Two rule nodes that one op can stand for.

    Attributes:
        kernel: the kernel's name.
        inner: the node that is computed first.
        outer: the node that reads it.
        step: the op and the rule of both.
        args: the op's arguments.
        keeps: which output of the op each node is; None where the op gives the outer one's alone.
        refusal: why the kernel cannot run on it; empty where it can.
    """

    kernel: str
    inner: fx.Node
    outer: fx.Node
    step: RuleOp
    args: tuple[Any, ...]
    keeps: tuple[int, int] | None
    refusal: str

    def join(self, graph: fx.Graph) -> None:
        """Put the op in the place of the outer node."""
        if self.keeps is None:
            self.outer.target, self.outer.args, self.outer.kwargs = self.step, self.args, {}
            return
        with graph.inserting_before(self.outer):
            both = graph.call_function(self.step, self.args)
            both.meta = {**self.outer.meta, "val": _value(graph, self.step, self.args)}
            for node, index in zip((self.inner, self.outer), self.keeps, strict=True):
                part = graph.call_function(operator.getitem, (both, index))
                part.meta = {**node.meta}
                node.replace_all_uses_with(part)
        for node in (self.outer, self.inner):
            graph.erase_node(node)


def pair_at(node: fx.Node) -> Pair | None:
    """The pair whose outer node this is, or None."""
    return next((pair for find in _FORMS if (pair := find(node)) is not None), None)


def call_of(node: fx.Node) -> Call:
    """A rule node's op on fake tensors."""
    flat, spec = tree(node)
    args, kwargs = pytree.tree_unflatten([value(x) for x in flat], spec)
    step = rule_op(node)
    return Call(step.op, args, kwargs, step.active)


def _value(graph: fx.Graph, step: RuleOp, args: Sequence[Any]) -> Any:
    with computing(fake_mode(graph)):
        return step(*map(value, args))


@dataclass(frozen=True)
class Gate(Rule):
    """``f(a) * b`` as one op: the uniform rule for the product, the identity rule for f.

    Attributes:
        shares: of a and of b.
    """

    shares: tuple[float, float]

    def linearize(self, call: Call) -> Linearization:
        a, b, name = call.args
        output = call.run()

        def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
            found: tuple[Tensor, Tensor] = torch.ops.fxlrp.gate_relevance(cotangent, a, b, name, *self.shares)
            return found

        return Linearization(output, pullback)

    def linearize_many(self, call: Call) -> Linearization:
        return self.linearize(call)


@dataclass(frozen=True)
class AddNorm(Rule):
    """``h = x + residual`` and its norm y as one op: the LN-rule for y, and ``G_h`` goes to both terms.

    Attributes:
        offset: added to the norm's weight.
        centred: whether the norm takes the mean away.
    """

    offset: float
    centred: bool

    def linearize(self, call: Call) -> Linearization:
        weight, outputs = call.args[2], call.run()
        rstd = outputs[2]

        def pullback(cotangent: Cotangent) -> tuple[Tensor | None, ...]:
            of_y, of_h, _ = cotangent
            found = torch.ops.fxlrp.norm_relevance(of_y, rstd, weight, of_h, 1.0, self.offset, self.centred)
            return (found,) * len(call.active)

        return Linearization(outputs, pullback)

    def linearize_many(self, call: Call) -> Linearization:
        return self.linearize(call)


def _gate(node: fx.Node) -> Pair | None:
    """A product by the uniform rule, of an activation by the identity rule that nothing else reads."""
    step = rule_op(node)
    if op_name(step.op) != "mul" or type(step.rule) is not Uniform or step.active != (0, 1):
        return None
    if step.rule.epsilon or len(node.args) != 2:
        return None
    shares = step.rule.shares or (0.5, 0.5)
    for i in (0, 1):
        inner, b = arg(node, i), arg(node, 1 - i)
        if not is_rule(inner) or type(rule_op(inner).rule) is not Identity or len(inner.users) > 1:
            continue
        name = activation_name(rule_op(inner).op, inner.args, inner.kwargs)
        if name in gate.ACTIVATIONS and isinstance(b, fx.Node):
            a, rule = arg(inner, 0), Gate((shares[i], shares[1 - i]))
            joined = RuleOp(torch.ops.fxlrp.gate.default, rule, (0, 1))
            refusal = gate.can_run(name, value(a), value(b))[1]
            return Pair("gate", inner, node, joined, (a, b, name), None, refusal or _unlike(a, b))
    return None


def _add_norm(node: fx.Node) -> Pair | None:
    """A norm by the LN-rule of a sum of two tensors that nothing reads before the norm does."""
    step = rule_op(node)
    inner: Any = arg(node, 0) if node.args else None
    if op_name(step.op) not in ("layer_norm", "rms_norm") or type(step.rule) is not NormRule:
        return None
    if step.active != (0,) or not is_rule(inner) or next(iter(inner.users)) is not node:
        return None
    add = rule_op(inner)
    is_plain = type(add.rule) in (Epsilon, Structural) and not add.rule.epsilon  # type: ignore[attr-defined]
    is_plain = is_plain and add.active == (0, 1) and len(inner.args) == 2 and not inner.kwargs
    if op_name(add.op) != "add" or not is_plain:
        return None
    given, centred = norm_arguments(call_of(node))
    nodes, _ = norm_arguments(Call(step.op, node.args, {**node.kwargs, "eps": given["eps"]}, step.active))
    refusal = norm_refusal(step.rule, call_of(node))
    x, residual = inner.args
    refusal = refusal or norm.can_run(value(x), value(residual))[1] or _unlike(x, residual)
    joined = RuleOp(torch.ops.fxlrp.add_norm.default, AddNorm(0.0, centred), (0, 1))
    args = (x, residual, nodes["weight"], nodes.get("bias"), given["eps"], 0.0, centred)
    return Pair("norm", inner, node, joined, args, (1, 0), refusal)


def _unlike(a: Any, b: Any) -> str:
    first, second = value(a), value(b)
    same = first.dtype == second.dtype and list(map(str, first.shape)) == list(map(str, second.shape))
    return "" if same else "the operands differ in shape or dtype"


_FORMS: Final = (_gate, _add_norm)

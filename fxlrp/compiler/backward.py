"""Backward: the pullbacks of a rule graph's nodes, last to first, as plain ATen: what transposes need."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..rules.base import Call, Rule, linearized_many
from ..rules.carry import Carry
from .choice import CHOICE, ROW, TARGETS
from .graphs import arg, tree, value
from .rewrite import RuleOp, is_rule, rule_op
from .template import Templates


@dataclass(eq=False)
class Backward:
    """The relevance graph under construction: each node's value and coefficient in it.

    ``carried`` is relevance itself, on its way from a rule for the first layer to the input.

    Attributes:
        module: the rule graph.
        of_rules: templates of its nodes.
        lead: how many coefficients each node gets: None for one, of the node's shape; else their number, a
            size or a symbol, which is then every coefficient's first dimension.
    """

    module: fx.GraphModule
    of_rules: Templates
    lead: Any = None
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    cotangents: dict[fx.Node, Any] = field(default_factory=dict)
    carried: dict[fx.Node, Any] = field(default_factory=dict)
    pending: dict[fx.Node, Any] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    joined: dict[Any, tuple[Any, list[fx.Node], int]] = field(default_factory=dict)

    # -- forward ---------------------------------------------------------------------------------------------

    def is_many(self, node: fx.Node) -> bool:
        """Whether a node's coefficient has the leading dimension."""
        return self.lead is not None and node.meta.get(TARGETS) != ROW

    def like(self, fake: Tensor) -> Tensor:
        """What a coefficient of a fake tensor looks like."""
        if self.lead is None:
            return fake
        with self.of_rules.mode:
            return fake.new_empty((self.lead, *fake.shape))

    def inlined(self, key: str, function: Any, operands: Sequence[tuple[Any, Any]]) -> Any:
        """A function in the graph, of nodes of it that come with what they look like."""
        template = self.of_rules.get(
            (key, self.lead is not None), lambda *given: (function(*given),), [v for _, v in operands]
        )
        return template.inline(self.graph, [n for n, _ in operands], [0])[0]

    def coefficient(self, node: fx.Node) -> Any:
        """What arrived at a node, or None; of an element of a tuple at its place there."""
        if node.target is operator.getitem and node.op == "call_function":
            return self.cotangents.get(arg(node, 0), {}).get(arg(node, 1))
        return self.cotangents.get(node)

    def forward(self, node: fx.Node) -> None:
        """Copy a node; where its pullback needs more than its operands and output, copy its template's
        forward.
        """
        if is_rule(node) and rule_op(node).active:
            template, flat, outs = self._template(node)
            later = [i for i in range(len(template.outputs)) if i >= outs]
            if template.saves(range(outs), later):
                known: dict[fx.Node, Any] = {}
                results = template.inline(
                    self.graph, [*self._operands(flat), *[None] * self._seeds(node)], range(outs), known
                )
                self._mark(known, node, "")
                self.pending[node] = known
                self.values[node] = results[0] if isinstance(value(node), Tensor) else tuple(results)
                return
        self.copy(node)

    def copy(self, node: fx.Node) -> None:
        """Copy a node as it is, without its rule."""
        copied = self.graph.node_copy(node, self._value)
        if is_rule(node):
            copied.target = rule_op(node).op
        copied.meta = dict(node.meta)
        self.values[node] = copied

    def _value(self, node: fx.Node) -> Any:
        return self.values[node]

    def _operands(self, flat: Sequence[Any]) -> list[Any]:
        return [self.values[x] if isinstance(x, fx.Node) else x for x in flat]

    def _template(self, node: fx.Node, other: RuleOp | None = None) -> tuple[Any, list[fx.Node], int]:
        """The joint template of a rule node (outputs first, then coefficients), its operand nodes, and the
        number of outputs; or the same with another rule than the node's.
        """
        if (node, other) in self.joined:
            return self.joined[node, other]
        step_op = other or rule_op(node)
        flat, spec = tree(node)
        operands = [x for x in flat if isinstance(x, fx.Node)]
        constants = tuple(None if isinstance(x, fx.Node) else x for x in flat)
        result_leaves, result_spec = pytree.tree_flatten(value(node))
        present = tuple(map(is_float_tensor, result_leaves))
        many = self.is_many(node)

        def joint(*arguments: Any) -> tuple[Any, ...]:
            given, seeds = iter(arguments[: len(operands)]), iter(arguments[len(operands) :])
            leaves = [next(given) if isinstance(x, fx.Node) else x for x in flat]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            call = Call(step_op.op, args, kwargs, step_op.active)
            cotangent = pytree.tree_unflatten([next(seeds) if p else None for p in present], result_spec)
            if many:
                output, coefficients = _many(step_op.rule, call, cotangent, self.lead, self.of_rules.mode)
            else:
                step = step_op.rule.linearize(call)
                output, coefficients = step.output, step.pullback(cotangent)
            return (*pytree.tree_leaves(output), *coefficients)

        seeds = [v for v, p in zip(result_leaves, present, strict=True) if p]
        if many:
            seeds = [self.like(v) for v in seeds]
        key = (many, *rule_key(step_op), str(spec), tuple((type(c), str(c)) for c in constants))
        template = self.of_rules.get(key, joint, [*(value(x) for x in operands), *seeds])
        self.constants.update(template.constants)
        self.joined[node, other] = (template, operands, len(result_leaves))
        return self.joined[node, other]

    def _seeds(self, node: fx.Node) -> int:
        return sum(map(is_float_tensor, pytree.tree_leaves(value(node))))

    def pull(self, node: fx.Node) -> None:
        template, operands, outs = self._template(node)
        known = self.pending.pop(node, None)
        if known is None:
            known = {}
            forward = self.values[node]
            results, parts = template.outputs[:outs], self._parts(node, forward)
            known.update((r, part) for r, part in zip(results, parts, strict=False) if isinstance(r, fx.Node))
        seeds = self._cotangent_leaves(node, self.cotangents[node])
        if node.meta.get(TARGETS) == CHOICE:
            seeds = [self.inlined("spread", _spread, [(g, value(node))]) for g in seeds]
        # PyTorch's derivatives make coefficients contiguous where their kernels need it; a template that was
        # traced with contiguous ones has left that out. The clean-up drops those that nothing needs.
        seeds = [self._aten(torch.ops.aten.contiguous.default, g) for g in seeds]
        before = set(known)
        flat, _ = tree(node)
        wanted = [outs + i for i in range(len(rule_op(node).active))]
        results = template.inline(self.graph, [*self._operands(operands), *seeds], wanted, known)
        self._mark({k: n for k, n in known.items() if k not in before}, node, "relevance of ")
        into = self.carried if rule_op(node).rule.direct else self.cotangents
        for position, coefficient in zip(rule_op(node).active, results, strict=True):
            if coefficient is not None:
                self.accumulate(flat[position], coefficient, into)

    def _parts(self, node: fx.Node, forward: Any) -> list[Any]:
        """A node's outputs in the graph, each by itself; none of them where they are nested."""
        if isinstance(value(node), Tensor):
            return [forward]
        found: list[Any] = []
        flat = pytree.tree_leaves(value(node))
        for i, leaf in enumerate(flat if len(flat) == len(value(node)) else ()):
            found.append(self.graph.call_function(operator.getitem, (forward, i)))
            found[-1].meta["val"] = leaf
        return found

    def carry(self, node: fx.Node) -> None:
        """Hand relevance itself on to a node's operands."""
        step_op = RuleOp(rule_op(node).op, Carry(), rule_op(node).active)
        for operand, relevance in self.handed_on(node, step_op, self.carried[node]).items():
            self.accumulate(operand, relevance, self.carried)

    def handed_on(self, node: fx.Node, step_op: RuleOp, arrived: Any) -> dict[fx.Node, Any]:
        """What another rule than the node's own gives its operands of what arrived at it."""
        template, operands, outs = self._template(node, step_op)
        seeds = self._cotangent_leaves(node, arrived)
        seeds = [self._aten(torch.ops.aten.contiguous.default, g) for g in seeds]
        wanted = [outs + i for i in range(len(step_op.active))]
        known: dict[fx.Node, Any] = {}
        results = template.inline(self.graph, [*self._operands(operands), *seeds], wanted, known)
        self._mark(known, node, "relevance of ")
        flat, _ = tree(node)
        found: dict[fx.Node, Any] = {}
        for position, made in zip(step_op.active, results, strict=True):
            if made is not None:
                found[flat[position]] = self._sum(found.get(flat[position]), made)
        return found

    def _cotangent_leaves(self, node: fx.Node, cotangent: Any) -> list[Any]:
        """The coefficients of a node's floating point outputs; zeros where none arrived at one of several."""
        if not isinstance(cotangent, dict):
            return [cotangent]
        found = []
        for i, leaf in enumerate(pytree.tree_leaves(value(node))):
            if is_float_tensor(leaf):
                if i not in cotangent:
                    output = (
                        self.graph.call_function(operator.getitem, (self.values[node], i))
                        if not isinstance(self.values[node], tuple)
                        else self.values[node][i]
                    )
                    output.meta.setdefault("val", leaf)
                    cotangent[i] = self._zeros(output, leaf, node, cotangent)
                found.append(cotangent[i])
        return found

    def _zeros(self, output: Any, fake: Tensor, node: fx.Node, arrived: dict[int, Any]) -> Any:
        if not self.is_many(node):
            return self._aten(torch.ops.aten.zeros_like.default, output)
        index, other = next(iter(arrived.items()))
        like = self.like(pytree.tree_leaves(value(node))[index])
        return self.inlined("zeros", zeros_of_many, [(output, fake), (other, like)])

    def accumulate(self, node: fx.Node, coefficient: Any, into: dict[fx.Node, Any] | None = None) -> None:
        """Add to a node's coefficient; an element of a tuple to its place in the tuple's."""
        into = self.cotangents if into is None else into
        if node.op == "call_function" and node.target is operator.getitem:
            parent, index = arg(node, 0), arg(node, 1)
            slots = into.setdefault(parent, {})
            slots[index] = self._sum(slots.get(index), coefficient)
        else:
            into[node] = self._sum(into.get(node), coefficient)

    def _sum(self, first: Any, second: Any) -> Any:
        if first is None:
            return second
        return self._aten(torch.ops.aten.add.Tensor, first, second)

    def _aten(self, op: Any, *operands: Any) -> fx.Node:
        """An op whose result looks like its first operand."""
        made = self.graph.call_function(op, operands)
        made.meta["val"] = value(operands[0])
        return made

    def _mark(self, made: Mapping[fx.Node, Any], node: fx.Node, prefix: str) -> None:
        """Say of a template's nodes, but for its inputs, which node's they are."""
        for old, new in made.items():
            is_made = isinstance(new, fx.Node) and new.op == "call_function" and old.op != "placeholder"
            if is_made and "relevance_of" not in new.meta:
                new.meta.update(
                    {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
                )
                if prefix:
                    new.meta["relevance_of"] = node.name


def rule_key(step: RuleOp) -> tuple[Any, ...]:
    """What tells the templates of one op and rule from others: a class that is no dataclass itself may hold
    more than the one that it extends compares.
    """
    rule = step.rule
    return step, None if "__dataclass_params__" in vars(type(rule)) else id(rule)


def _many(
    rule: Rule, call: Call, cotangent: Any, lead: Any, mode: Any
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """A rule's output and its pullback of K coefficients; one by one where their number is fixed and they do
    not go at once.
    """
    step = linearized_many(rule, call)
    try:
        with sizes_kept(mode):
            return step.output, step.pullback(cotangent)
    except Exception:
        if not isinstance(lead, int):
            raise
    step = rule.linearize(call)
    rows = [
        step.pullback(pytree.tree_map_only(Tensor, operator.itemgetter(k), cotangent)) for k in range(lead)
    ]
    return step.output, tuple(
        None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)
    )


def sizes_kept(mode: Any) -> Any:
    """A region in which tracing raises where it would fix a size of the trace."""
    kept = getattr(mode.shape_env, "error_on_new_guards", None)
    return contextlib.nullcontext() if kept is None else kept()


def is_float_tensor(leaf: Any) -> bool:
    """Whether a leaf is a tensor that can have a coefficient."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def zeros_of_many(output: Tensor, other: Tensor) -> Tensor:
    """Coefficients ``[K, *shape]`` of 0, as many as another node has."""
    return output.new_zeros((other.shape[0], *output.shape))


def _spread(rows: Tensor) -> Tensor:
    """Coefficients of rows ``[batch, K, ...]``, one a target, as each target's own ``[K, batch, K, ...]``."""
    places = torch.arange(rows.shape[1], device=rows.device)
    own = (places[:, None] == places).reshape(rows.shape[1], 1, rows.shape[1], *(1,) * (rows.dim() - 2))
    return torch.where(own, rows, 0.0)

"""Transpose: rule graph + target -> relevance graph: inputs in, relevance out, without autograd."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import GraphError
from ..rules.base import Call, Rule
from ..rules.carry import Carry
from .activity import Source
from .cleanup import clean
from .graphs import arg, fake_mode, outputs, tree, value
from .ids import route
from .rewrite import RuleOp, is_rule, rule_op
from .seed import Seed
from .template import Templates


@dataclass(frozen=True, eq=False)
class Relevance:
    """A relevance graph with the order of what it returns.

    The graph returns ``(relevance, value, coefficients, latents)``: relevance and coefficients as tuples in
    the order of ``names``, the explained scalars ``[batch]``, and pairs of relevance and coefficient in the
    order of ``latents``.
    """

    graph: fx.GraphModule
    names: tuple[str, ...]
    latents: tuple[str, ...]


def transpose(
    module: fx.GraphModule,
    sources: Sequence[Source],
    seed: Seed,
    *,
    latents: dict[str, str] | None = None,
    templates: Templates | None = None,
) -> Relevance:
    """Differentiate the rule graph into its relevance graph.

    Args:
        module: the rule graph.
        sources: where the explained inputs enter.
        seed: the explained scalar as a function of the graph's outputs.
        latents: names to report by, and the nodes whose relevance is returned too.
        templates: of rule nodes, where other runs on the same captured graph have traced some.
    """
    own = Templates(fake_mode(module.graph))
    return _Transposition(
        module, tuple(sources), seed, dict(latents or {}), own, own if templates is None else templates
    ).run()


@dataclass(eq=False)
class _Transposition:
    """One run of :func:`transpose`: the graph under construction, each node's value and coefficient in it.

    ``carried`` is relevance itself, on its way from a rule for the first layer to the input.
    """

    module: fx.GraphModule
    sources: tuple[Source, ...]
    seed: Seed
    latents: dict[str, str]
    templates: Templates
    of_rules: Templates
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    cotangents: dict[fx.Node, Any] = field(default_factory=dict)
    carried: dict[fx.Node, Any] = field(default_factory=dict)
    pending: dict[fx.Node, Any] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    joined: dict[Any, tuple[Any, list[fx.Node], int]] = field(default_factory=dict)

    def run(self) -> Relevance:
        nodes = [n for n in self.module.graph.nodes if n.op != "output"]
        for node in nodes:
            self._forward(node)
        scalar, seeds = self._seed()
        for node, coefficient in seeds:
            self._accumulate(node, coefficient)
        kept: dict[fx.Node, Any] = {}
        wanted = {s.node for s in self.sources} | {n for n in nodes if n.name in self.latents.values()}
        for node in reversed(nodes):
            if node in wanted and node in self.cotangents:
                kept[node] = self.cotangents[node]
            if node in self.cotangents and is_rule(node):
                self._backward(node)
            if node in self.carried and is_rule(node):
                self._carry(node)
        by_input = self._relevance(kept)
        by_name = {node.name: node for node in nodes}
        latents = tuple(
            self._relevance_at(by_name[at], kept)
            for at in self.latents.values()
            if by_name[at] in kept or by_name[at] in self.carried
        )
        relevance = tuple(r for r, _ in by_input.values())
        self.graph.output((relevance, scalar, tuple(c for _, c in by_input.values()), latents))
        graph = clean(self.module, self.graph, self.constants)
        return Relevance(
            graph,
            tuple(by_input),
            tuple(n for n, at in self.latents.items() if by_name[at] in kept or by_name[at] in self.carried),
        )

    # -- forward ---------------------------------------------------------------------------------------------

    def _forward(self, node: fx.Node) -> None:
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
                self._mark(known.values(), node, "")
                self.pending[node] = known
                self.values[node] = results[0] if isinstance(value(node), Tensor) else tuple(results)
                return
        copied = self.graph.node_copy(node, self._value)
        if is_rule(node):
            copied.target = rule_op(node).op
        copied.meta = dict(node.meta)
        self.values[node] = copied

    def _value(self, node: fx.Node) -> Any:
        return self.values[node]

    def _operands(self, flat: Sequence[Any]) -> list[Any]:
        return [self.values[x] if isinstance(x, fx.Node) else x for x in flat]

    # -- backward --------------------------------------------------------------------------------------------

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
        present = tuple(
            isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in result_leaves
        )

        def joint(*arguments: Any) -> tuple[Any, ...]:
            given, seeds = iter(arguments[: len(operands)]), iter(arguments[len(operands) :])
            leaves = [next(given) if isinstance(x, fx.Node) else x for x in flat]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            step = step_op.rule.linearize(Call(step_op.op, args, kwargs, step_op.active))
            cotangent = pytree.tree_unflatten([next(seeds) if p else None for p in present], result_spec)
            coefficients = step.pullback(cotangent)
            return (*pytree.tree_leaves(step.output), *coefficients)

        # A coefficient looks like the output that it belongs to.
        seeds = [v for v, p in zip(result_leaves, present, strict=True) if p]
        key = (step_op, _own(step_op.rule), str(spec), tuple((type(c), str(c)) for c in constants))
        template = self.of_rules.get(key, joint, [*(value(x) for x in operands), *seeds])
        self.constants.update(template.constants)
        self.joined[node, other] = (template, operands, len(result_leaves))
        return self.joined[node, other]

    def _seeds(self, node: fx.Node) -> int:
        return sum(
            isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())
            for v in pytree.tree_leaves(value(node))
        )

    def _backward(self, node: fx.Node) -> None:
        template, operands, outs = self._template(node)
        known = self.pending.pop(node, None)
        if known is None:
            known = {}
            forward = self.values[node]
            if isinstance(value(node), Tensor) and isinstance(template.outputs[0], fx.Node):
                known[template.outputs[0]] = forward
        seeds = self._cotangent_leaves(node, self.cotangents[node])
        # PyTorch's derivatives make coefficients contiguous where their kernels need it; a template that was
        # traced with contiguous ones has left that out. The clean-up drops those that nothing needs.
        seeds = [self._aten(torch.ops.aten.contiguous.default, g) for g in seeds]
        before = set(known)
        flat, _ = tree(node)
        wanted = [outs + i for i in range(len(rule_op(node).active))]
        results = template.inline(self.graph, [*self._operands(operands), *seeds], wanted, known)
        self._mark([n for k, n in known.items() if k not in before], node, "relevance of ")
        into = self.carried if rule_op(node).rule.direct else self.cotangents
        for position, coefficient in zip(rule_op(node).active, results, strict=True):
            if coefficient is not None:
                self._accumulate(flat[position], coefficient, into)

    def _carry(self, node: fx.Node) -> None:
        """Hand relevance itself on to a node's operands."""
        step_op = RuleOp(rule_op(node).op, Carry(), rule_op(node).active)
        template, operands, outs = self._template(node, step_op)
        seeds = [
            self._aten(torch.ops.aten.contiguous.default, g)
            for g in self._cotangent_leaves(node, self.carried[node])
        ]
        wanted = [outs + i for i in range(len(step_op.active))]
        known: dict[fx.Node, Any] = {}
        results = template.inline(self.graph, [*self._operands(operands), *seeds], wanted, known)
        self._mark(known.values(), node, "relevance of ")
        flat, _ = tree(node)
        for position, relevance in zip(step_op.active, results, strict=True):
            if relevance is not None:
                self._accumulate(flat[position], relevance, self.carried)

    def _cotangent_leaves(self, node: fx.Node, cotangent: Any) -> list[Any]:
        """The coefficients of a node's floating point outputs; zeros where none arrived at one of several."""
        if not isinstance(cotangent, dict):
            return [cotangent]
        found = []
        for i, leaf in enumerate(pytree.tree_leaves(value(node))):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                if i not in cotangent:
                    output = (
                        self.graph.call_function(operator.getitem, (self.values[node], i))
                        if not isinstance(self.values[node], tuple)
                        else self.values[node][i]
                    )
                    cotangent[i] = self.graph.call_function(torch.ops.aten.zeros_like.default, (output,))
                found.append(cotangent[i])
        return found

    def _accumulate(self, node: fx.Node, coefficient: Any, into: dict[fx.Node, Any] | None = None) -> None:
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

    def _mark(self, made: Any, node: fx.Node, prefix: str) -> None:
        for new in made:
            if isinstance(new, fx.Node) and new.op == "call_function" and "relevance_of" not in new.meta:
                new.meta.update(
                    {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
                )
                if prefix:
                    new.meta["relevance_of"] = node.name

    # -- ends ------------------------------------------------------------------------------------------------

    def _seed(self) -> tuple[Any, list[tuple[fx.Node, Any]]]:
        nodes = self.seed.reads(outputs(self.module.graph))
        *_, last = (n for n in self.graph.nodes if n.op == "placeholder")
        extra = [self.graph.placeholder(name) for name in self.seed.operand_names]
        for placeholder in reversed(extra):
            last.append(placeholder)
        fakes = self.seed.operand_values(self.templates.mode)
        template = self.templates.get(
            ("seed", id(self.seed)), self.seed.joint, [*(value(n) for n in nodes), *fakes]
        )
        for placeholder, fake in zip(extra, fakes, strict=True):
            placeholder.meta["val"] = fake
        for node in template.graph.nodes:  # tensors that the user's target function closes over
            if node.op == "get_attr" and node.target in template.constants:
                name = f"target{node.target}"
                self.constants[name] = template.constants[node.target]
                node.target = name
        wanted = range(len(template.outputs))
        scalar, *coefficients = template.inline(
            self.graph, [*(self.values[n] for n in nodes), *extra], wanted
        )
        return scalar, [(n, c) for n, c in zip(nodes, coefficients, strict=True) if c is not None]

    def _relevance(self, kept: dict[fx.Node, Any]) -> dict[str, tuple[Any, Any]]:
        """Relevance and coefficient of each explained input by name; several lookups of one input add up."""
        found: dict[str, tuple[Any, Any]] = {}
        for source in self.sources:
            if source.node not in kept and source.node not in self.carried:
                continue
            name = str(source.input.target)
            relevance, coefficient = self._relevance_at(source.node, kept, source.is_lookup)
            if source.is_lookup:
                tokens = relevance
                relevance = route(
                    self.graph, source.node, source.path, source.input, tokens, self.values, self.templates
                )
            if name in found:
                relevance = self._aten(torch.ops.aten.add.Tensor, found[name][0], relevance)
                coefficient = found[name][1]
            found[name] = (relevance, coefficient)
        if not found:
            raise GraphError("no relevance arrived at any source although the plan found a path")
        return found

    def _relevance_at(
        self, node: fx.Node, kept: dict[fx.Node, Any], is_lookup: bool = False
    ) -> tuple[Any, Any]:
        """Relevance of a node, summed over the hidden size of a lookup, and its coefficient: the product, and
        what was carried there.
        """
        direct = self.carried.get(node)
        if direct is not None and is_lookup:
            direct = self._call("tokens carried", _summed, node, direct)
        if node not in kept:
            return direct, self._aten(torch.ops.aten.zeros_like.default, self.values[node])
        product = (
            self._call("tokens", _token_relevance, node, kept[node])
            if is_lookup
            else self._call("relevance", operator.mul, node, kept[node])
        )
        return (product if direct is None else self._sum(product, direct)), kept[node]

    def _call(self, key: str, function: Any, node: fx.Node, coefficient: Any) -> Any:
        """A function of a node's value and its coefficient."""
        fake = value(node)
        template = self.templates.get(key, lambda v, g: (function(v, g),), [fake, fake])
        return template.inline(self.graph, [self.values[node], coefficient], [0])[0]


def _own(rule: Rule) -> int | None:
    """What tells a rule apart that does not compare all that it is made of: a class that is no dataclass
    itself may hold more than the one that it extends.
    """
    return None if "__dataclass_params__" in vars(type(rule)) else id(rule)


def _token_relevance(embedding: Tensor, coefficient: Tensor) -> Tensor:
    return (embedding * coefficient).sum(-1)


def _summed(embedding: Tensor, relevance: Tensor) -> Tensor:
    return relevance.sum(-1)

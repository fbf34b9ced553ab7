"""Transpose: rule graph + target -> relevance graph: inputs in, relevance out, without autograd."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import GraphError
from ..rules.base import wide
from .activity import Source
from .backward import Backward
from .cleanup import clean
from .graphs import fake_mode, outputs, value
from .ids import route
from .parameters import dependents, positions, relevance_of, weight_rule
from .positions import PositionLeaf, per_position
from .rewrite import RuleOp, is_rule, rule_op
from .seed import Seed
from .template import Templates


@dataclass(frozen=True, eq=False)
class Relevance:
    """A relevance graph with the order of what it returns.

    The graph returns ``(relevance, value, coefficients, latents)``: relevance as a tuple in the order of
    ``names`` and then of ``positions``, the explained scalars ``[batch]``, coefficients in the order of
    ``names``, and pairs of relevance and coefficient in the order of ``latents``. Of several targets each of
    these has K behind the batch. Where parameters are asked for, their relevance is a fifth element.
    """

    graph: fx.GraphModule
    names: tuple[str, ...]
    latents: tuple[str, ...]
    positions: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


def transpose(
    module: fx.GraphModule,
    sources: Sequence[Source],
    seed: Seed,
    *,
    latents: dict[str, str] | None = None,
    templates: Templates | None = None,
    parameters: dict[str, str] | None = None,
) -> Relevance:
    """Differentiate the rule graph into its relevance graph.

    Args:
        module: the rule graph.
        sources: where the explained inputs enter.
        seed: the explained scalar as a function of the graph's outputs.
        latents: names to report by, and the nodes whose relevance is returned too.
        templates: of rule nodes, where other runs on the same captured graph have traced some.
        parameters: names of parameters whose relevance is returned too, and what the graph calls them.
    """
    own = Templates(fake_mode(module.graph))
    return _Transposition(
        module,
        own if templates is None else templates,
        seed.lead,
        sources=tuple(sources),
        seed=seed,
        latents=dict(latents or {}),
        templates=own,
        parameters=dict(parameters or {}),
    ).run()


@dataclass(eq=False, kw_only=True)
class _Transposition(Backward):
    """One run of :func:`transpose`."""

    sources: tuple[Source, ...]
    seed: Seed
    latents: dict[str, str]
    templates: Templates
    parameters: dict[str, str]
    weighed: dict[fx.Node, Any] = field(default_factory=dict)

    def run(self) -> Relevance:
        nodes = [n for n in self.module.graph.nodes if n.op != "output"]
        for node in nodes:
            self.forward(node)
        scalar, seeds = self._seed()
        for node, coefficient in seeds:
            self.accumulate(node, coefficient)
        kept: dict[fx.Node, Any] = {}
        wanted = {s.node for s in self.sources} | {n for n in nodes if n.name in self.latents.values()}
        data = {s.node for s in self.sources}
        weights = dependents(self.module.graph, self.parameters, data) if self.parameters else set()
        for node in reversed(nodes):
            if node in wanted and node in self.cotangents:
                kept[node] = self.cotangents[node]
            self._weigh(node, weights)
            if node in self.cotangents and is_rule(node):
                self.pull(node)
            if node in self.carried and is_rule(node):
                self.carry(node)
        by_input = self._relevance(kept)
        # A latent that nothing of the target is computed from is no node here, or one that nothing reaches.
        by_name = {node.name: node for node in nodes if node in kept or node in self.carried}
        reached = {name: by_name[at] for name, at in self.latents.items() if at in by_name}
        latents = tuple(self._last(*self._relevance_at(node, kept)) for node in reached.values())
        labels = {s.name for s in self.sources if isinstance(s, PositionLeaf)}
        inputs = tuple(name for name in by_input if name not in labels)
        located = tuple(name for name in by_input if name in labels)
        ends = {name: self._last(*pair) for name, pair in by_input.items()}
        relevance = tuple(ends[name][0] for name in (*inputs, *located))
        ways = (relevance, scalar, tuple(ends[name][1] for name in inputs), latents)
        weighed = {
            name: self._call("parameter", relevance_of, node, self.weighed[node])
            for name, at in self.parameters.items()
            for node in nodes
            if node.op == "get_attr" and str(node.target) == at and node in self.weighed
        }
        self.graph.output((*ways, tuple(weighed.values())) if self.parameters else ways)
        graph = clean(self.module, self.graph, self.constants)
        return Relevance(graph, inputs, tuple(reached), located, tuple(weighed))

    def _weigh(self, node: fx.Node, weights: set[fx.Node]) -> None:
        """Hand a node's coefficient on to what it is made of parameters."""
        arrived = [x for x in (self.cotangents.get(node), self.weighed.get(node)) if x is not None]
        places = positions(node, weights) if arrived and node.op == "call_function" else ()
        if not places or node.target is operator.getitem:  # an element's went to its tuple
            return
        op: Any = rule_op(node).op if is_rule(node) else node.target
        rule = weight_rule(node)
        found = {} if rule is None else self.handed_on(node, RuleOp(op, rule, places), arrived[0])
        for place, coefficient in found.items():
            self.accumulate(place, coefficient, self.weighed)

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
            name = source.name
            if isinstance(source, PositionLeaf):
                coefficient = kept[source.node]
                summed = functools.partial(per_position, source.dim)
                relevance = self._call(f"positions {source.dim}", summed, source.node, coefficient)
            else:
                relevance, coefficient = self._relevance_at(source.node, kept, source.is_lookup)
            if source.is_lookup:
                tokens = relevance
                relevance = route(
                    self.graph,
                    source.node,
                    source.path,
                    source.input,
                    tokens,
                    self.values,
                    self.templates,
                    self.lead,
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
            return direct, self._call("no coefficient", _nothing, node, self.carried[node])
        product = (
            self._call("tokens", _token_relevance, node, kept[node])
            if is_lookup
            else self._call("relevance", operator.mul, node, kept[node])
        )
        return (product if direct is None else self._sum(product, direct)), kept[node]

    def _call(self, key: str, function: Any, node: fx.Node, coefficient: Any) -> Any:
        """A function of a node's value and its coefficient."""
        fake = value(node)
        template = self.templates.get(key, lambda v, g: (function(v, g),), [fake, self.like(fake)])
        return template.inline(self.graph, [self.values[node], coefficient], [0])[0]

    def _last(self, *coefficients: Any) -> tuple[Any, ...]:
        """With the targets behind the samples, ``[batch, K, ...]``, as they are returned."""
        if self.lead is None:
            return coefficients
        made = [self.graph.call_function(torch.ops.aten.transpose.int, (c, 0, 1)) for c in coefficients]
        return tuple(made)


def _token_relevance(embedding: Tensor, coefficient: Tensor) -> Tensor:
    # Products of half precision would be rounded, or overflow, before they are summed.
    return (wide(embedding) * coefficient).sum(-1).to(embedding.dtype)


def _summed(embedding: Tensor, relevance: Tensor) -> Tensor:
    return relevance.sum(-1)


def _nothing(embedding: Tensor, relevance: Tensor) -> Tensor:
    return torch.zeros_like(relevance)

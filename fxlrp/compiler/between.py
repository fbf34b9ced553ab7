"""Between: from coefficients at some nodes of the rule graph to those at others, and that map's transpose.

A plan's rules make every node's pullback linear in the coefficient. ``pull`` composes them from named nodes
back to others (vjp); ``push`` composes their transposes forward (jvp), so that for all coefficients G and
tangents T ``<pull(G), T> = <G, push(T)>``.
"""

from __future__ import annotations

import difflib
import fnmatch
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..rules import Composite, preset
from ..rules.base import Call, linearized_many
from .activity import Source, explained, reachable
from .assign import assign
from .backward import Backward, is_float_tensor, rule_key, sizes_kept, zeros_of_many
from .canonicalize import Canonical
from .cleanup import clean
from .demand import only_outputs
from .graphs import arg, is_float, outputs, tree, value
from .latents import module_outputs
from .plan import Plan
from .positions import with_position_leaves
from .rewrite import is_rule, rewrite, rule_op
from .verify import verify_relevance, verify_rules


@dataclass(frozen=True, eq=False)
class Stretch:
    """The rule graph between named nodes.

    Attributes:
        rule_graph: the forward with rule nodes.
        plan: which node has which rule.
        given: names and nodes that coefficients or tangents are given for.
        wanted: names and nodes that they are asked for.
    """

    rule_graph: fx.GraphModule
    plan: Plan
    given: Mapping[str, fx.Node]
    wanted: Mapping[str, fx.Node]


def stretch(
    canonical: Canonical,
    composite: Composite,
    read: Collection[int],
    logits: int | None,
    given: Sequence[str],
    wanted: Sequence[str],
    *,
    forward: bool,
    strict: bool,
    inputs: Collection[str] = (),
) -> Stretch:
    """Give the nodes between others their rules.

    Args:
        canonical: the canonical graph.
        composite: where rules come from.
        read: the model's outputs that count: what leads to none of them has no place in the graph.
        logits: which of them the logits are.
        given: names of module outputs, nodes, inputs, or ``"output"``.
        wanted: likewise; module paths may have wildcards.
        forward: whether what is wanted lies behind what is given.
        strict: see ``lrp_compile``.
        inputs: names of the explained inputs.

    Raises:
        InputError: a name is unknown, or what it names holds no relevance.
    """
    graph = only_outputs(canonical.graph, read)
    ends = [node for node in outputs(graph.graph) if is_float(node)]
    sources = explained(graph, ends, inputs)
    if preset(composite.base).positional:
        graph, leaves = with_position_leaves(graph, sources)
        ends = [node for node in outputs(graph.graph) if is_float(node)]
        sources = (*explained(graph, ends, inputs), *leaves)
    known = _known(graph, sources, None if logits is None else outputs(graph.graph)[logits])
    starts, stops = _found(graph, known, given), _found(graph, known, wanted)
    active = reachable(graph, [s.node for s in sources])
    nodes = {node.name: node for node in graph.graph.nodes}
    for name, at in {**starts, **stops}.items():
        if nodes[at] not in active:
            raise InputError(
                f"'{name}' depends on no explained input: it counts as a constant and holds no relevance."
            )
    targets = [nodes[at] for at in (stops if forward else starts).values()]
    plan = assign(graph, sources, targets, composite, strict=strict)
    direct = [row for row in plan if row.rule.direct]
    if direct:
        raise InputError(
            f"{direct[0].rule!r} at '{direct[0].node}' gives relevance and no coefficients, and vjp and jvp "
            "are maps of coefficients: take a composite without rules for the first layer."
        )
    rules = verify_rules(rewrite(graph, plan), plan)
    nodes = {node.name: node for node in rules.graph.nodes}
    return Stretch(
        rules, plan, {n: nodes[at] for n, at in starts.items()}, {n: nodes[at] for n, at in stops.items()}
    )


def pull(found: Stretch, canonical: Canonical, lead: Any) -> fx.GraphModule:
    """The graph from inputs and coefficients ``[K, *shape]`` of what is given to those of what is wanted.

    It returns them with the nodes' values, of what is wanted first: ``(coefficients, values)``.
    """
    return _Pull(found.rule_graph, canonical.templates, lead).run(found)


def push(found: Stretch, canonical: Canonical, lead: Any) -> fx.GraphModule:
    """The graph from inputs and tangents ``[K, *shape]`` of what is given to those of what is wanted.

    It returns them with the nodes' values, of what is wanted first: ``(tangents, values)``.
    """
    return _Push(found.rule_graph, canonical.templates, lead).run(found)


@dataclass(eq=False)
class _Ends(Backward):
    """What both directions share: vectors come in as inputs of the graph, and others go out with values."""

    def vectors(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        *_, last = (n for n in self.graph.nodes if n.op == "placeholder")
        made = [self.graph.placeholder(f"vector_{i}") for i in range(len(nodes))]
        for vector, node in zip(reversed(made), reversed(nodes), strict=True):
            last.append(vector)
            vector.meta["val"] = self.like(value(node))
        return made

    def returned(self, found: Stretch, arrived: Mapping[fx.Node, Any], vector: fx.Node) -> fx.GraphModule:
        wanted, given = list(found.wanted.values()), list(found.given.values())
        results = [
            self.inlined("zeros", zeros_of_many, [(self.values[n], value(n)), (vector, value(vector))])
            if arrived.get(n) is None
            else arrived[n]
            for n in wanted
        ]
        values = [self.values[node] for node in (*wanted, *given)]
        self.graph.output((tuple(results), tuple(values)))
        module = clean(self.module, self.graph, self.constants)
        return verify_relevance(module)


@dataclass(eq=False)
class _Pull(_Ends):
    """Coefficients from the last node to the first."""

    def run(self, found: Stretch) -> fx.GraphModule:
        nodes = [n for n in self.module.graph.nodes if n.op != "output"]
        behind = _behind(nodes, set(found.wanted.values()))
        for node in nodes:
            self.forward(node) if _reads(node, behind) else self.copy(node)
        vectors = self.vectors(list(found.given.values()))
        for node, vector in zip(found.given.values(), vectors, strict=True):
            self.accumulate(node, vector)
        for node in reversed(nodes):
            if node in self.cotangents and is_rule(node) and _reads(node, behind):
                self.pull(node)
        return self.returned(found, {n: self.coefficient(n) for n in found.wanted.values()}, vectors[0])


@dataclass(eq=False)
class _Push(_Ends):
    """Tangents from the first node to the last: at each node the transpose of its rule's pullback."""

    tangents: dict[fx.Node, Any] = field(default_factory=dict)

    def run(self, found: Stretch) -> fx.GraphModule:
        nodes = [n for n in self.module.graph.nodes if n.op != "output"]
        for node in nodes:
            if node.op == "placeholder":
                self.copy(node)
        given = list(found.given.values())
        vectors = self.vectors(given)
        for node in nodes:
            if is_rule(node) and any(self._tangent(tree(node)[0][i]) for i in rule_op(node).active):
                self._push(node)
            elif node.op != "placeholder":
                self.copy(node)
            if node in given:
                vector = vectors[given.index(node)]
                self.tangents[node] = self._sum(self._tangent(node), vector)
        return self.returned(found, {n: self._tangent(n) for n in found.wanted.values()}, vectors[0])

    def _tangent(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return None
        if node not in self.tangents and node.op == "call_function" and node.target is operator.getitem:
            return (self.tangents.get(arg(node, 0)) or {}).get(arg(node, 1))
        return self.tangents.get(node)

    def _push(self, node: fx.Node) -> None:
        step_op = rule_op(node)
        flat, spec = tree(node)
        operands = [x for x in flat if isinstance(x, fx.Node)]
        constants = tuple(None if isinstance(x, fx.Node) else x for x in flat)
        arrived = tuple(i for i in step_op.active if self._tangent(flat[i]) is not None)

        def joint(*arguments: Any) -> tuple[Any, ...]:
            given, tangents = iter(arguments[: len(operands)]), arguments[len(operands) :]
            leaves = [next(given) if isinstance(x, fx.Node) else x for x in flat]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            call = Call(step_op.op, args, kwargs, step_op.active)
            step = linearized_many(step_op.rule, call)
            with sizes_kept(self.of_rules.mode):
                pushed = _transposed(step.output, step.pullback, call.active, arrived, tangents)
            return (*pytree.tree_leaves(step.output), *pushed)

        key = ("push", arrived, *rule_key(step_op), str(spec), tuple((type(c), str(c)) for c in constants))
        fakes = [self.like(value(flat[i])) for i in arrived]
        template = self.of_rules.get(key, joint, [*(value(x) for x in operands), *fakes])
        self.constants.update(template.constants)
        known: dict[fx.Node, Any] = {}
        results = template.inline(
            self.graph,
            [*self._operands(operands), *(self._tangent(flat[i]) for i in arrived)],
            range(len(template.outputs)),
            known,
        )
        self._mark(known, node, "tangent of ")
        outs = len(results) // 2
        single = isinstance(value(node), Tensor)
        self.values[node] = results[0] if single else tuple(results[:outs])
        self.tangents[node] = results[1] if single else dict(enumerate(results[outs:]))


def _transposed(
    output: Any, pullback: Any, active: tuple[int, ...], arrived: tuple[int, ...], tangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The transpose of a pullback, which is linear: its derivative at any coefficient, 0 say, pulled back."""
    leaves, spec = pytree.tree_flatten(output)
    count = tangents[0].shape[0]
    with torch.enable_grad():
        zeros = [
            z.new_zeros((count, *z.shape)).requires_grad_(True) if is_float_tensor(z) else None
            for z in leaves
        ]
        coefficients = dict(zip(active, pullback(pytree.tree_unflatten(zeros, spec)), strict=True))
    pairs = [
        (coefficients[i], tangent)
        for i, tangent in zip(arrived, tangents, strict=True)
        if coefficients[i] is not None and coefficients[i].requires_grad
    ]
    if not pairs:
        return (None,) * len(leaves)
    found = iter(
        torch.autograd.grad(
            [c for c, _ in pairs],
            [z for z in zeros if z is not None],
            [t for _, t in pairs],
            allow_unused=True,
        )
    )
    return tuple(None if z is None else next(found) for z in zeros)


def _behind(nodes: Sequence[fx.Node], starts: Collection[fx.Node]) -> set[fx.Node]:
    """The starts and all that is computed of them."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node in starts or _reads(node, found):
            found.add(node)
    return found


def _reads(node: fx.Node, nodes: set[fx.Node]) -> bool:
    return not nodes.isdisjoint(node.all_input_nodes)


def _known(graph: fx.GraphModule, sources: Sequence[Source], logits: fx.Node | None) -> dict[str, str]:
    """Names that users may say, and the nodes that they mean: a module path comes before a node's name."""
    known = {
        n.name: n.name
        for n in graph.graph.nodes
        if n.op in ("placeholder", "call_function") and is_float(n) and isinstance(value(n), Tensor)
    }
    known |= {s.name: s.node.name for s in reversed(sources)}
    if logits is not None:
        known |= dict.fromkeys(("output", "logits"), logits.name)
    return known | module_outputs(graph)


def _found(graph: fx.GraphModule, known: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    paths = module_outputs(graph)
    found: dict[str, str] = {}
    for name in names:
        if name in known:
            found[name] = known[name]
            continue
        matched = {path: at for path, at in paths.items() if fnmatch.fnmatchcase(path, name)}
        if not matched:
            near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
            raise InputError(
                f"There is no module, node or input '{name}' on the way to the output."
                + (f" Did you mean {', '.join(map(repr, near))}?" if near else "")
                + " Names: module paths, nodes of explainer.rule_graph, inputs, 'output'."
            )
        found.update(matched)
    return found

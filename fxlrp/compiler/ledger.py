"""The ledger: where the relevance went. Inputs + absorbed = the explained scalar, per sample.

For every rule node what came in and did not go on is booked by cause, each from its own formula and not as
the difference that would make the sum right: a rule that loses relevance shows as a residual. Only
first-order Taylor steps, whose remainder has no other formula, are booked by difference.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..rules.base import Call, Linearization, Rule, dot
from ..rules.carry import Carry
from .activity import Source, reachable
from .graphs import arg, is_float, leaves, outputs
from .ids import arriving
from .provenance import module_path
from .rewrite import is_rule, rule_op
from .seed import Seed


@dataclass(frozen=True)
class Entry:
    """What one node absorbed for one cause.

    Attributes:
        node: the node's name in the rule graph.
        module: path of its module.
        cause: ``bias``, ``epsilon``, ``empty``, ``frozen``, ``constant``, ``remainder`` or ``target``.
        amount: relevance ``[batch]``, ``[batch, K]`` of several targets, float64.
    """

    node: str
    module: str
    cause: str
    amount: Tensor


@dataclass(frozen=True)
class Account:
    """Explained scalars, ``[batch]`` or ``[batch, K]``, and what was absorbed on the way to the inputs."""

    value: Tensor
    entries: tuple[Entry, ...]


def account(
    module: fx.GraphModule, sources: Sequence[Source], seed: Seed, inputs: Sequence[Tensor]
) -> Account:
    """Run the rule graph once and pull each scalar back by itself, booking at every node.

    ``inputs`` are those of the relevance graph: the model's, a position if the target has one, the seed's
    operands.

    One backward pass per sample: the sum over everything then is that sample's, whatever became of the batch
    dimension inside the model.
    """
    graph = module.graph
    taken = len(inputs) - len(seed.operand_names)
    operands = inputs[taken:]
    values, steps = _forward(module, inputs[:taken])
    dependent = reachable(module, [s.node for s in sources])
    read = [values[n] for n in seed.reads(outputs(graph))]
    score, *_ = seed.joint(*read, *operands)
    entries: dict[tuple[str, str, str], list[Tensor]] = {}
    scalars = score.numel()
    for sample in range(scalars):
        seeds = _one(seed, read, operands, sample)
        arrived = sum(
            (dot(z, g) for z, g in zip(read, seeds, strict=True) if g is not None),
            start=torch.zeros((), dtype=torch.float64),
        )
        _book(
            entries, ("target", "", "target"), score.flatten()[sample].double().cpu() - arrived.cpu(), sample
        )
        cotangents: dict[fx.Node, Any] = {}
        carried: dict[fx.Node, Any] = {}
        for node, g in zip(seed.reads(outputs(graph)), seeds, strict=True):
            if g is not None:
                _accumulate(cotangents, node, g)
        _pull(graph, values, steps, dependent, cotangents, carried, entries, sample)
        for node in dict.fromkeys(s.node for s in sources if s.is_lookup and s.path):
            if node not in cotangents and node not in carried:
                continue
            readers = [s for s in sources if s.node is node]
            relevance = values[node].double() * cotangents.get(node, 0.0) + carried.get(node, 0.0)
            amount = _looked_up_elsewhere(readers, values, relevance)
            _book(entries, (node.name, module_path(node), "constant"), amount.cpu(), sample)
    rows = tuple(
        Entry(node, path, cause, torch.stack(_padded(amounts, scalars)).reshape(score.shape))
        for (node, path, cause), amounts in entries.items()
    )
    return Account(
        score.double().cpu(),
        tuple(row for row in rows if bool((row.amount != 0).any())),
    )


def _forward(
    module: fx.GraphModule, inputs: Sequence[Tensor]
) -> tuple[dict[fx.Node, Any], dict[fx.Node, Linearization]]:
    values: dict[fx.Node, Any] = {}
    steps: dict[fx.Node, Linearization] = {}
    given = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            value: Any = operator.attrgetter(node.target)(module)
            values[node] = value.detach() if isinstance(value, Tensor) else value
        elif is_rule(node):
            steps[node] = node.target.rule.linearize(node.target.bind(args, kwargs))
            values[node] = steps[node].output
        else:
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    return values, steps


def _pull(
    graph: fx.Graph,
    values: dict[fx.Node, Any],
    steps: dict[fx.Node, Linearization],
    dependent: set[fx.Node],
    cotangents: dict[fx.Node, Any],
    carried: dict[fx.Node, Any],
    entries: dict[Any, list[Tensor]],
    sample: int,
) -> None:
    def hand_on(
        node: fx.Node, rule: Rule, step: Linearization, found: dict[fx.Node, Any], into: dict[fx.Node, Any]
    ) -> None:
        cotangent = _as_tree(values[node], found[node])
        coefficients = step.pullback(cotangent)
        with torch.no_grad():
            booked = rule.absorbed(_call(node, values), values[node], cotangent, coefficients)
        if "constant" in booked and _reads_frozen(node, dependent):
            booked["frozen"] = booked.pop("constant")
        for cause, amount in booked.items():
            _book(entries, (node.name, module_path(node), cause), amount.cpu(), sample)
        operands = leaves(node)
        for i, g in zip(rule_op(node).active, coefficients, strict=True):
            if g is not None:
                _accumulate(into, operands[i], g)

    for node in reversed(graph.nodes):
        if node in steps and node in cotangents:
            rule = rule_op(node).rule
            hand_on(node, rule, steps[node], cotangents, carried if rule.direct else cotangents)
        if node in steps and node in carried:
            hand_on(node, Carry(), Carry().linearize(_call(node, values)), carried, carried)


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Call:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    return rule_op(node).bind(args, kwargs)


def _looked_up_elsewhere(sources: Sequence[Source], values: dict[fx.Node, Any], relevance: Tensor) -> Tensor:
    """Relevance of one lookup's tokens whose ids are no input's: prompts, start tokens, padding."""
    tokens = relevance.sum(-1)
    rest = tokens.sum()
    for source in sources:
        arrived = arriving(source.node, source.path, source.input, tokens, values)
        rest = rest if arrived is None else rest - arrived.sum()
    return rest


def _reads_frozen(node: fx.Node, dependent: set[fx.Node]) -> bool:
    """Whether a constant operand depends on the explained inputs: it is one only because a rule froze it."""
    return any(
        leaf in dependent and is_float(leaf)
        for i, leaf in enumerate(leaves(node))
        if isinstance(leaf, fx.Node) and i not in rule_op(node).active
    )


def _accumulate(cotangents: dict[fx.Node, Any], node: fx.Node, g: Tensor) -> None:
    if node.target is operator.getitem:
        parent, index = arg(node, 0), arg(node, 1)
        slots = cotangents.setdefault(parent, {})
        slots[index] = slots[index] + g if index in slots else g
    else:
        cotangents[node] = cotangents[node] + g if node in cotangents else g


def _as_tree(output: Any, cotangent: Any) -> Any:
    """The coefficients of a multi-output op in the shape of its output, None where none arrived."""
    if not isinstance(cotangent, dict):
        return cotangent
    return type(output)(cotangent.get(i) for i in range(len(output)))


def _one(seed: Seed, read: Sequence[Tensor], operands: Sequence[Tensor], sample: int) -> list[Tensor | None]:
    """The seed's gradient for one of the scalars alone."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in read]
    with torch.enable_grad():
        score = seed.score(inputs, operands).flatten()[sample]
    floats = [x for x in inputs if x.requires_grad]
    gradients = iter(
        torch.autograd.grad(score, floats, allow_unused=True) if score.requires_grad else [None] * len(floats)
    )
    return [next(gradients) if x.requires_grad else None for x in inputs]


def _book(entries: dict[Any, list[Tensor]], key: Any, amount: Tensor, sample: int) -> None:
    found = entries.setdefault(key, [])
    found.extend([torch.zeros((), dtype=torch.float64)] * (sample - len(found)))
    found.append(amount)


def _padded(amounts: list[Tensor], batch: int) -> list[Tensor]:
    return amounts + [torch.zeros((), dtype=torch.float64)] * (batch - len(amounts))

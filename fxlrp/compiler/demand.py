"""Demand slicing: only the rows of the output that the target reads are computed.

The choice of one position per sample moves up through every step that treats positions alike: a head, a final
norm, the last block's MLP and residual sums, until a step mixes positions. It is exact, and it makes
full-sequence logits, which dominate small models, cost one row.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from ..rules.activation import RATIOS, op_name
from .graphs import arg, copy_graph, fake_mode, leaves, output_node, outputs, value
from .template import ancestors

_POINTWISE = frozenset(
    (
        *RATIOS,
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "neg",
        "to",
        "to_copy",
        "type_as",
        "dropout",
        "clone",
        "contiguous",
        "alias",
        "sigmoid",
        "softplus",
        "exp",
        "rsqrt",
        "sqrt",
        "reciprocal",
        "normalize",
        "normalize_divide",
        "self_gate",
        "float",
    )
)


#: Meta key of nodes that hold one row for each of several targets: ``ROW`` for what is computed of such rows,
#: ``CHOICE`` for where they are chosen. The coefficient of a row is that of its target alone.
TARGETS, ROW, CHOICE = "targets", "row", "choice"


def select_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Positions ``[batch]`` or ``[batch, K]`` of ``x [batch, sequence, ...]``: ``[batch, 1 or K, ...]``."""
    rows = torch.arange(x.shape[0], device=x.device)
    if positions.dim() > 1:
        return x[rows.unsqueeze(1), positions]
    return x[rows, positions].unsqueeze(1)


def last_row(x: Tensor) -> Tensor:
    """The last position of each sample: ``[batch, sequence, ...]`` -> ``[batch, 1, ...]``."""
    return x[:, -1:]


def last_unpadded(mask: Tensor) -> Tensor:
    """The last unpadded position, for padding on either side: ``[batch, sequence]`` -> ``[batch]``."""
    return ((mask != 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)


def last_before_padding(mask: Tensor) -> Tensor:
    """As :func:`last_unpadded`, for a mask that is true where there is padding."""
    return last_unpadded(mask == 0)


def only_outputs(module: fx.GraphModule, wanted: Collection[int]) -> fx.GraphModule:
    """The graph without what only other outputs need; those stand as None."""
    new = copy_graph(module, "Demanded")
    output = output_node(new.graph)
    output.args = (tuple(node if i in wanted else None for i, node in enumerate(outputs(new.graph))),)
    new.graph.eliminate_dead_code()
    new.recompile()
    return new


def demand_rows(
    module: fx.GraphModule,
    output: int,
    positions: str | None,
    *,
    given: bool,
    padding: bool = False,
    whole: Collection[str] = (),
    lead: Any = None,
) -> fx.GraphModule:
    """A graph whose only output is the chosen rows ``[batch, 1, classes]`` of one sequence output.

    With ``lead`` these are ``[batch, K, classes]``, one row for each of K targets.

    Args:
        module: the canonical graph.
        output: which of its outputs.
        positions: where positions come from: a new input of this name if ``given``, the padding mask's name
            if not; None for the last position.
        given: see ``positions``.
        padding: whether the mask is true where there is padding, and not where there is none.
        whole: names of nodes of which every position is wanted.
        lead: the number of positions of each sample, a size or a symbol; None for one.
    """
    old = module.graph
    target = outputs(old)[output]
    needed = ancestors([target], set())
    mode = fake_mode(old)
    full = _full(target, needed, whole, () if lead is None else _computed(old))

    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    rows: dict[fx.Node, fx.Node] = {}
    chosen: Any = None

    def compute(op: Any, *args: Any) -> fx.Node:
        node = graph.call_function(op, args)
        with mode:
            node.meta = {"val": op(*(value(a) for a in args)), "made_by": "demand"}
        return node

    def row(node: Any) -> Any:
        if not (isinstance(node, fx.Node) and _is_sequence(node, target)):
            return env[node] if isinstance(node, fx.Node) else node
        if node not in rows:
            rows[node] = (
                compute(select_rows, env[node], chosen)
                if chosen is not None
                else compute(last_row, env[node])
            )
            rows[node].meta.update(
                {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
            )
            if lead is not None:
                rows[node].meta[TARGETS] = CHOICE
        return rows[node]

    for node in old.nodes:
        if node.op == "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
    if positions is not None and given:
        chosen = graph.placeholder(positions)
        with mode:
            shape = value(target).shape[:1] if lead is None else (value(target).shape[0], lead)
            chosen.meta = {"val": torch.zeros(shape, dtype=torch.long, device=value(target).device)}
    elif positions is not None:
        mask = next(env[n] for n in old.nodes if n.op == "placeholder" and n.target == positions)
        chosen = compute(last_before_padding if padding else last_unpadded, mask)
    for node in old.nodes:
        if node.op in ("placeholder", "output") or node not in needed:
            continue
        if node in full:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
        else:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), row)
            rows[node] = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
            rows[node].meta = {**node.meta, "val": value(node)[:, :1]}
            if lead is not None:
                with mode:
                    shape = (value(node).shape[0], lead, *value(node).shape[2:])
                    rows[node].meta.update({"val": value(node).new_empty(shape), TARGETS: ROW})
    graph.output((row(target),))
    graph.lint()
    return fx.GraphModule(module, graph, "Demanded")


def _computed(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on an input."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _full(
    target: fx.Node, needed: set[fx.Node], whole: Collection[str], computed: Collection[fx.Node] = ()
) -> set[fx.Node]:
    """Nodes of which every position is needed: steps that mix positions, and what such steps read.

    ``computed``: nodes that rows may share with others only as sequences, since each row has a coefficient of
    its own.
    """
    full: set[fx.Node] = set()

    def row_wise(node: fx.Node) -> bool:
        return _is_row_wise(node, target) and not any(
            x in computed and not _is_sequence(x, target) for x in node.all_input_nodes
        )

    for node in (n for n in reversed(target.graph.nodes) if n in needed):
        if node is target:
            continue
        readers = [user for user in node.users if user in needed]
        if node.name in whole or not row_wise(node) or any(u in full or not row_wise(u) for u in readers):
            full.add(node)
    return full if row_wise(target) else full | {target}


def _is_sequence(node: fx.Node, target: fx.Node) -> bool:
    """Whether a node's first two sizes are the output's batch and sequence."""
    mine, its = value(node), value(target)
    return (
        isinstance(mine, Tensor)
        and mine.dim() >= 3
        and all(str(a) == str(b) for a, b in zip(mine.shape[:2], its.shape[:2], strict=True))
    )


def _is_row_wise(node: fx.Node, target: fx.Node) -> bool:
    """Whether a step treats every position of ``[batch, sequence, ...]`` alike and for itself."""
    if node.op != "call_function" or not _is_sequence(node, target):
        return False
    name = op_name(node.target)
    rank: int = value(node).dim()
    nodes = [x for x in leaves(node) if isinstance(x, fx.Node)]
    tensors = [x for x in nodes if isinstance(value(x), Tensor)]
    if len(tensors) < len(nodes):
        return False
    if name in _POINTWISE:
        return all(_is_sequence(x, target) or value(x).dim() <= 1 for x in tensors) and all(
            value(x).dim() in (0, 1, rank) for x in tensors
        )
    if name == "linear":
        return _is_sequence(arg(node, 0), target) and not any(
            _is_sequence(x, target) for x in node.args[1:] if isinstance(x, fx.Node)
        )
    if name in ("layer_norm", "rms_norm"):
        return len(arg(node, 1)) <= rank - 2
    if name in ("mean", "sum"):
        dims = arg(node, 1) if len(node.args) > 1 else None
        return (
            isinstance(dims, (list, tuple))
            and all((d < 0 and d > 1 - rank) or d > 1 for d in dims)
            and ((len(node.args) > 2 and node.args[2] is True) or node.kwargs.get("keepdim") is True)
        )
    if name == "slice":
        start = arg(node, 2) if len(node.args) > 2 else None
        stop = arg(node, 3) if len(node.args) > 3 else None
        dim: int = arg(node, 1) if len(node.args) > 1 else 0
        return dim > 1 or (start in (None, 0) and isinstance(stop, int) and stop >= 2**62)
    return False

"""Functional graphs: no mutation, no regions; what leaves a no-grad region is detached.

Graphs whose in-place ops touch only fresh, unaliased tensors are rewritten node by node, which is fast.
Everything else (mutated views, autocast regions, other higher-order ops) goes through PyTorch's own
functionalisation, which retraces the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import GraphError
from .graphs import arg

_GRAD_REGION = "wrap_with_set_grad_enabled"
_AUTOCAST_REGION = "wrap_with_autocast"
#: Ops that return their operand itself where they have nothing to do. Active dropout is refused.
_IDLE = ("aten.to", "aten.type_as", "aten.contiguous", "aten.dropout", "aten.feature_dropout")


@torch.library.custom_op("fxlrp::stop", mutates_args=())
def _stop(x: Tensor) -> Tensor:
    """Marks what leaves a no-grad region while PyTorch retraces the graph, which inlines the region."""
    return x.clone()


@_stop.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def functionalize(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program itself where its graph can be rewritten node by node, else as retraced by PyTorch."""
    if _is_simple(program.graph_module):
        return program
    for _, region in _regions(program.graph_module, _GRAD_REGION):
        _mark_outputs(region)
    retraced: torch.export.ExportedProgram = program.run_decompositions({})
    return retraced


def is_functional(module: fx.GraphModule) -> bool:
    """Whether no node writes into an operand."""
    return not any(_is_mutation(node) for node in module.graph.nodes)


def rewrite(graph: fx.Graph, root: torch.nn.Module) -> None:
    """Inline regions, replace in-place ops, drop markers: the new graph is functional. Edits a graph under
    construction that nobody else holds."""
    for node in list(graph.nodes):
        if _is_region(node):
            _inline(graph, node, root)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.ops.fxlrp.stop.default:
            node.target = torch.ops.aten.detach.default
        elif node.target is torch.ops.aten.copy.default:
            _replace_copy(graph, node)
        elif _is_mutation(node):
            functional = _functional(node.target)
            if functional is None:
                raise GraphError(f"'{node.name}' ({node.target}) cannot be made functional by itself")
            node.target = functional
            mutated = node.args[0]
            later = _after(node)
            mutated.replace_all_uses_with(node, delete_user_cb=lambda user, later=later: user in later)


def _is_simple(module: fx.GraphModule) -> bool:
    aliases: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if _is_region(node):
            region = _region_of(node, module)
            if _is_region_of(node, _AUTOCAST_REGION) and node.args[2]:
                return False
            if any(_is_mutation(n) or _is_region(n) for n in region.graph.nodes):
                return False
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        elif _is_mutation(node):
            mutated = node.args[0]
            if (
                _functional(node.target) is None
                or mutated.op != "call_function"
                or aliases.get(mutated, mutated) is not mutated
                or _promotes(node, mutated)
            ):
                return False
            later = _after(node)
            seen_elsewhere = [n for n, base in aliases.items() if base is mutated]
            if any(user in later for view in seen_elsewhere for user in view.users):
                return False
        elif _is_view(node):
            base = node.args[0]
            if isinstance(base, fx.Node):
                aliases[node] = aliases.get(base, base)
    return True


def _is_mutation(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return (
        (
            schema is not None
            and not schema.is_mutable
            and any(argument.alias_info is not None for argument in schema.arguments)
        )
        or getattr(node.target, "__name__", "") == "getitem"
        or any(
            name in str(node.target) for name in ("reshape", "contiguous", "to.dtype", "flatten", "type_as")
        )
    )


def _promotes(node: fx.Node, mutated: fx.Node) -> bool:
    """Whether the in-place op casts its result down, which its functional form would not do."""
    mine = mutated.meta["val"].dtype
    others = [leaf.meta.get("val") for leaf in node.all_input_nodes if leaf is not mutated]
    return any(
        isinstance(other, Tensor) and other.dim() > 0 and torch.promote_types(mine, other.dtype) is not mine
        for other in others
    )


def _functional(op: Any) -> Any:
    """``aten.add_.Tensor`` -> ``aten.add.Tensor``, or None where there is none that means the same."""
    packet = op.overloadpacket.__name__
    if (
        op.namespace != "aten"
        or not packet.endswith("_")
        or packet in ("copy_", "fill_", "zero_", "set_", "resize_")
    ):
        return None
    try:
        return getattr(getattr(torch.ops.aten, packet[:-1]), op._overloadname)
    except AttributeError:
        return None


def _after(node: fx.Node) -> set[fx.Node]:
    found, current = set(), node.next
    while current.op != "root":
        found.add(current)
        current = current.next
    return found


def _is_region(node: fx.Node) -> bool:
    return _is_region_of(node, _GRAD_REGION) or _is_region_of(node, _AUTOCAST_REGION)


def _is_region_of(node: fx.Node, kind: str) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.__name__ == kind


def _region_position(node: fx.Node) -> int:
    """Where the region's graph stands among the node's arguments; its operands follow."""
    return next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")


def _region_of(node: fx.Node, root: torch.nn.Module) -> fx.GraphModule:
    return cast(fx.GraphModule, root.get_submodule(arg(node, _region_position(node)).target))


def _regions(module: fx.GraphModule, kind: str) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    for child in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in child.graph.nodes:
            if node.op == "call_function" and _is_region_of(node, kind) and not node.args[0]:
                yield node, _region_of(node, child)


def _mark_outputs(region: fx.GraphModule) -> None:
    output = next(n for n in region.graph.nodes if n.op == "output")

    def mark(value: Any) -> Any:
        value = _same_tensor(value)
        if (
            not (isinstance(value, fx.Node) and _is_float(value))
            or value.op == "placeholder"
            or value.target is torch.ops.fxlrp.stop.default
        ):
            return value
        with region.graph.inserting_before(output):
            marked = region.graph.call_function(torch.ops.fxlrp.stop.default, (value,))
        marked.meta = dict(value.meta)
        return marked

    output.args = tuple(fx.map_arg(output.args, mark)) if isinstance(output.args, tuple) else output.args
    region.recompile()


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _same_tensor(value: Any) -> Any:
    """The earliest node that is this very tensor: ops that have nothing to do return their operand itself.

    In a region without gradients such an op takes no gradient away, but export lets what follows the region
    read the operand through it.
    """
    while isinstance(value, fx.Node) and value.op == "call_function" and _returns_operand(value):
        value = value.args[0]
    return value


def _returns_operand(node: fx.Node) -> bool:
    if str(node.target).rpartition(".")[0] not in _IDLE or not isinstance(node.args[0], fx.Node):
        return False
    given, found = node.args[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(given, Tensor) and isinstance(found, Tensor)) or _copies(node):
        return False
    layouts = [(x.dtype, x.device, list(map(str, x.stride()))) for x in (given, found)]
    return layouts[0] == layouts[1]


def _copies(node: fx.Node) -> bool:
    """Whether a cast is told to copy even where it has nothing to do."""
    schema = node.target._schema  # type: ignore[union-attr]
    place = next((i for i, argument in enumerate(schema.arguments) if argument.name == "copy"), None)
    return place is not None and bool(
        node.args[place] if place < len(node.args) else node.kwargs.get("copy", False)
    )


def _inline(graph: fx.Graph, node: fx.Node, root: torch.nn.Module) -> None:
    region = _region_of(node, root)
    operands = node.args[_region_position(node) + 1 :]
    stops = _is_region_of(node, _GRAD_REGION) and not node.args[0]
    inputs = [n for n in region.graph.nodes if n.op == "placeholder"]
    env: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    with graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "call_function":
                env[inner] = graph.node_copy(inner, env.__getitem__)
        output = next(n for n in region.graph.nodes if n.op == "output")

        def leave(value: Any) -> Any:
            value = _same_tensor(value)
            result = env[value]
            if value.op == "placeholder" or not (stops and isinstance(result, fx.Node) and _is_float(result)):
                return result
            detached = graph.call_function(torch.ops.aten.detach.default, (result,))
            detached.meta = dict(result.meta)
            return detached

        results = pytree.tree_leaves(
            fx.map_arg(output.args[0], leave), is_leaf=lambda x: isinstance(x, fx.Node)
        )
    for user in list(node.users):
        user.replace_all_uses_with(results[arg(user, 1)])
        graph.erase_node(user)
    graph.erase_node(node)


def _replace_copy(graph: fx.Graph, node: fx.Node) -> None:
    """``copy(a, b)`` has no derivative in PyTorch; it is b, cast and expanded like a."""
    target, source = node.args[:2]
    with graph.inserting_before(node):
        cast = graph.call_function(torch.ops.aten.type_as.default, (source, target))
        cast.meta = dict(node.meta)
        grown = graph.call_function(torch.ops.aten.expand_as.default, (cast, target))
        grown.meta = dict(node.meta)
    node.replace_all_uses_with(grown)
    graph.erase_node(node)

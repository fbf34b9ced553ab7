"""Templates: the pullback of one node as a small ATen graph, traced once per distinct node and inlined.

A deep model repeats the same few nodes in every layer. Tracing each distinct one once and copying its graph
makes the relevance graph of 32 layers cost little more than that of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from .functional import is_functional, rewrite

#: What a symbolic number of targets is taken for while tracing; a prime that other sizes hardly have.
_HINT = 11

#: Ops that cost nothing at run time, so that a backward may repeat them instead of keeping the forward's.
_FREE = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "unsqueeze",
        "squeeze",
        "transpose",
        "permute",
        "t",
        "expand",
        "detach",
        "alias",
        "slice",
        "select",
        "sym_size",
        "mul",
        "add",
        "sub",
        "floordiv",
        "getitem",
        "scalar_tensor",
    ]
)


@dataclass(frozen=True, eq=False)
class Template:
    """A traced function of tensors: its graph, inputs, flat outputs, and tensors that it closes over."""

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)

    def inline(
        self,
        into: fx.Graph,
        operands: Sequence[Any],
        wanted: Sequence[int],
        known: dict[fx.Node, Any] | None = None,
    ) -> list[Any]:
        """Copy what some of the outputs need into a graph.

        Args:
            into: the graph under construction.
            operands: what stands for each input.
            wanted: which outputs.
            known: nodes of the template that the graph already has; what is copied is added to it.

        Returns:
            What stands for the wanted outputs.
        """
        env = {} if known is None else known
        env.update(zip(self.inputs, operands, strict=True))
        roots = [self.outputs[i] for i in wanted]
        needed = ancestors([r for r in roots if isinstance(r, fx.Node)], set(env))
        for node in self.graph.nodes:
            if node in needed and node not in env:
                env[node] = into.node_copy(node, env.__getitem__)
                env[node].meta = dict(node.meta)
        return [env[r] if isinstance(r, fx.Node) else r for r in roots]

    def saves(self, outputs: Sequence[int], later: Sequence[int]) -> bool:
        """Whether later outputs need values that earlier ones compute and that are not free to repeat."""
        first = [self.outputs[i] for i in outputs]
        forward = ancestors([n for n in first if isinstance(n, fx.Node)], set(self.inputs))
        ends = set(self.inputs) | set(first)
        backward = ancestors([self.outputs[i] for i in later if isinstance(self.outputs[i], fx.Node)], ends)
        return any(node in forward and not _is_free(node) for node in backward - ends)


def ancestors(roots: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Roots and all that they are computed of, not going beyond the nodes in ``stop``."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                stack.extend(node.all_input_nodes)
    return found


def _is_free(node: fx.Node) -> bool:
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return getattr(target, "__name__", "") in _FREE
    value = node.meta.get("val")
    return packet.__name__ in _FREE and (
        packet.__name__ not in ("mul", "add", "sub") or not isinstance(value, Tensor)
    )


def trace(function: Callable[..., Sequence[Any]], values: Sequence[Any], name: str) -> Template:
    """Trace a function on fake tensors and symbolic sizes; below autograd, so that its vjps are ops.

    Tensors that it closes over are called after ``name``.
    """
    with torch.no_grad():
        # New tensor objects, since tracing tells operands apart by identity and one may be given twice.
        operands = [v.detach() if isinstance(v, Tensor) else v for v in values]
        module = make_fx(function)(*operands)
        if not is_functional(module):  # PyTorch's derivatives may write through views
            module = make_fx(torch.func.functionalize(module))(*operands)
    graph = module.graph
    rewrite(graph, module)
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            constant, node.target = getattr(module, node.target), f"{name}{node.target}"
            constants[node.target] = constant
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (
            torch.ops.aten.detach.default,
            torch.ops.aten.alias.default,
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    output = next(n for n in graph.nodes if n.op == "output")
    flat = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    inputs = tuple(n for n in graph.nodes if n.op == "placeholder")
    return Template(graph, inputs, tuple(flat), constants)


def is_symbol(size: Any) -> bool:
    """Whether a size may still change: nothing that was traced has fixed it."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_Symbol)


@dataclass(eq=False)
class Templates:
    """Templates by what they were traced for."""

    mode: Any
    _known: dict[Any, Template] = field(default_factory=dict)
    _lead: Any = None

    def lead(self) -> Any:
        """A symbol for how many targets there are; an int where this trace can have none."""
        if not is_symbol(self._lead):
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            env = self.mode.shape_env
            if env is None:
                return _HINT
            source = ConstantSource(f"targets{len(env.var_to_range)}")
            fake = self.mode.from_tensor(torch.empty(_HINT), symbolic_context=context, source=source)
            self._lead = fake.shape[0]
        return self._lead

    def get(self, key: Any, function: Callable[..., Sequence[Any]], values: Sequence[Any]) -> Template:
        """The template of a function at values like these; ``key`` stands for the function."""
        full = (key, tuple(describe(v) for v in values))
        if full not in self._known:
            with self.mode, enable_python_dispatcher():
                self._known[full] = trace(function, values, f"template{len(self._known)}")
        return self._known[full]

    def __len__(self) -> int:
        return len(self._known)


def describe(value: Any) -> Any:
    """What a template depends on per operand: a tensor's dtype, device, sizes, strides; symbol, constant."""
    if isinstance(value, Tensor):
        return (
            value.dtype,
            value.device,
            tuple(map(str, value.shape)),
            tuple(map(str, value.stride())) if value.layout is torch.strided else None,
        )
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value)
    return type(value), value

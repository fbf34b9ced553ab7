"""Lower: a relevance graph to something that runs it."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import InputError
from .blocks import outline
from .cudagraphs import CudaRecorder, Replayed
from .factors import merged
from .inductor import Compilable
from .inputs import collection_paused, plain_region
from .products import by_onednn, is_faster

#: Takes the relevance graph's inputs, returns its outputs.
Runner = Callable[..., Any]
#: For how many shapes of inputs it is kept which kernels they need.
_KEPT_SHAPES = 256


def lower(
    graph: fx.GraphModule | None,
    backend: str,
    device: torch.device,
    *,
    blocks: bool = True,
    onednn: bool = True,
) -> Runner:
    """A callable for the relevance graph.

    Args:
        graph: the relevance graph; None only asks whether there is such a backend.
        backend: one of ``BACKENDS``.
        device: where the inputs are.
        blocks: whether layers that are alike are compiled once, where there are enough (``blocks.TIMES``).
        onednn: whether linear maps may be oneDNN's, on processors where that was measured to be faster.

    Raises:
        InputError: an unknown backend, or one that does not serve this device.
    """
    if backend not in BACKENDS:
        raise InputError(f"There is no backend {backend!r}. Backends: {', '.join(BACKENDS)}.")
    if graph is None:
        return _nothing
    chosen = ("inductor" if device.type == "cuda" else "eager") if backend == "auto" else backend
    if chosen == "eager":
        graph = merged(graph)
    if onednn and device.type == "cpu" and is_faster():
        graph = by_onednn(graph)
    return _LOWERED[chosen](graph, device, blocks)


def _nothing(*args: Any) -> Any:
    raise AssertionError("nothing was lowered")


class _Eager:
    def __init__(self, graph: fx.GraphModule) -> None:
        self.run = direct(graph)

    def __call__(self, *args: Any) -> Any:
        with plain_region():
            return self.run(*args)


class _Inductor(_Eager):
    """The same, compiled; outside inference and autocast regions, whose effects the graph holds already."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.run = torch.compile(graph, fullgraph=True, dynamic=True)


class _Blocks:
    """A graph of blocks whose kernels are looked up once for each shape of inputs and then just called.

    Inputs are made contiguous, so that their shapes decide the strides of everything.
    """

    def __init__(self, outlined: fx.GraphModule) -> None:
        self.run = direct(outlined)
        self.calls = [n.target for n in outlined.graph.nodes if n.op == "call_module"]
        self.blocks = {name: Compilable(getattr(outlined, name)) for name in dict.fromkeys(self.calls)}
        self.known: dict[Any, Runner] = {}

    def __call__(self, *args: Any) -> Any:
        shapes = tuple([a.shape for a in args])
        args = tuple([a.contiguous() for a in args])
        run = self.known.get(shapes)
        with plain_region():
            return self._first(shapes, args) if run is None else run(*args)

    def _first(self, shapes: Any, args: tuple[Any, ...]) -> Any:
        found: list[Any] = []

        def call(name: str, *given: Any) -> Any:
            found.append(self.blocks[name].kernel(given))
            return found[-1](*given)

        result = self.run(*[functools.partial(call, name) for name in self.calls], *args)
        if len(self.known) >= _KEPT_SHAPES:
            self.known.clear()
        self.known[shapes] = functools.partial(self.run, *found)
        return result


def _eager(graph: fx.GraphModule, device: torch.device, blocks: bool) -> Runner:
    return _Eager(graph)


def _inductor(graph: fx.GraphModule, device: torch.device, blocks: bool) -> Runner:
    with collection_paused():
        outlined = outline(graph) if blocks else None
        if outlined is None:
            return _Inductor(graph)
        made = _Blocks(outlined.graph)
        return made if all(block.is_complete for block in made.blocks.values()) else _Inductor(graph)


def _cudagraphs(graph: fx.GraphModule, device: torch.device, blocks: bool) -> Runner:
    if device.type != "cuda":
        raise InputError(
            f"backend='cudagraphs' records CUDA kernels, but the inputs are on {device}. Move model and "
            "inputs to a GPU, or use backend='auto'."
        )
    return Replayed(_inductor(graph, device, blocks), CudaRecorder(device))


_LOWERED = {"eager": _eager, "inductor": _inductor, "cudagraphs": _cudagraphs}
BACKENDS = ("auto", *_LOWERED)


def direct(module: fx.GraphModule) -> Runner:
    """The graph's code over the ops' entries in the dispatcher and the weights themselves.

    For small tensors, looking up an op by its path, the Python frame of ``OpOverload.__call__`` and fetching
    weights module by module take as long as the ops do. What its calls of submodules call are the first
    arguments, one for each call.
    """
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    weights: list[Any] = []
    called: list[fx.Node] = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            weights.append(operator.attrgetter(node.target)(module))
            known[node] = graph.placeholder(f"weight_{len(weights)}_")
    for node in module.graph.nodes:
        if node.op == "call_module":
            called.append(graph.placeholder(f"call_{len(called)}_"))
    calls = iter(called)
    for node in module.graph.nodes:
        if node.op == "call_module":
            operands = fx.map_arg(node.args, known.__getitem__)
            known[node] = graph.call_function(operator.call, (next(calls), *operands))
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], known.__getitem__))
        elif node not in known:
            known[node] = graph.node_copy(node, known.__getitem__)
    code = graph.python_code("self")
    entries: dict[str, Any] = {}

    def entry(found: re.Match[str]) -> str:
        op = operator.attrgetter(found[1])(torch.ops)
        if not isinstance(op, torch._ops.OpOverload):
            return found[0]
        name = "op_" + found[1].replace(".", "_")
        entries[name] = op._op
        return f"{name}("

    source = re.sub(r"torch\.ops\.(\w+\.\w+\.\w+)\(", entry, code.src)
    names = {**code.globals, **entries}
    exec(compile(source, "<relevance graph>", "exec"), names)
    return functools.partial(names["forward"], None, *weights)

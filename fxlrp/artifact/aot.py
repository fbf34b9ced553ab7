"""Native code beside a graph: PyTorch's ahead-of-time package of the last call's program.

It takes the weights as inputs, so they are in the file once. Loading it loads a shared library from the file.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compiler.graphs import placeholders, value
from ..compiler.inputs import plain_region
from ..compiler.lower import Runner
from ..compiler.pipeline import Program
from ..compiler.shapes import expression
from ..errors import ArtifactError, first_line
from ..traces import Call
from .header import PACKAGE
from .weights import blocks

#: How many targets to trace with, where any number will do.
_TARGETS = 3


def compiled(program: Program, last: Call) -> dict[str, Tensor]:
    """The package of a program, as bytes by name.

    Raises:
        ArtifactError: PyTorch does not compile it, with its reason.
    """
    module, weights = lifted(program.relevance.graph)
    examples, sizes = _examples(program, last)
    dynamic = (*(dict[int, Any]() for _ in weights), *sizes)
    try:
        with plain_region(), tempfile.TemporaryDirectory() as folder:
            exported = torch.export.export(
                module, (*weights, *examples), dynamic_shapes=dynamic, strict=False
            )
            path = str(Path(folder) / "program.pt2")
            torch._inductor.aoti_compile_and_package(exported, package_path=path)
            content = bytearray(Path(path).read_bytes())
    except Exception as error:  # whatever the compiler raises
        raise ArtifactError(
            f"PyTorch does not compile this program ahead of time: {first_line(error)}. Save it without aot."
        ) from error
    return {PACKAGE: torch.frombuffer(content, dtype=torch.uint8).clone()}


def native_runner(package: Tensor, graph: fx.GraphModule) -> Runner:
    """What runs a package, on the weights of the graph that it was made of.

    Raises:
        ArtifactError: PyTorch does not load it, with its reason.
    """
    _, weights = lifted(graph)
    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        for block in blocks(package):
            file.write(block)
        file.flush()
        try:
            native = torch._inductor.aoti_load_package(file.name)
        except Exception as error:  # another version of PyTorch, another processor
            raise ArtifactError(
                f"The artifact's native code does not load here: {first_line(error)}. Load without aot."
            ) from error

    def run(*args: Tensor) -> Any:
        with plain_region():
            return native(*weights, *args)

    return run


def lifted(module: fx.GraphModule) -> tuple[nn.Module, list[Tensor]]:
    """The graph with its weights as its first inputs, and the weights."""
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    weights: list[Tensor] = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found: Any = module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            weights.append(found)
            known[node] = graph.placeholder(f"weight_{len(weights)}")
    graph.output(graph.graph_copy(module.graph, known))
    return fx.GraphModule({}, graph, "Lifted"), weights


def _examples(program: Program, last: Call) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Inputs and operands of at least two where sizes may change, and which may."""
    free = torch.export.Dim.DYNAMIC  # an error where one would be fixed: the code would run for any size
    shapes = last.trace.shapes.sizes
    sizes: dict[Any, int] = {}
    for tensor, shape in zip(last.bound.tensors, shapes, strict=True):
        for i, size in enumerate(shape):
            if not isinstance(size, int):
                sizes.setdefault(size, max(2, tensor.shape[i]))
    tensors = [
        _grown(t, [s if isinstance(s, int) else sizes[s] for s in shape])
        for t, shape in zip(last.bound.tensors, shapes, strict=True)
    ]
    changing = [{i: free for i, s in enumerate(shape) if not isinstance(s, int)} for shape in shapes]
    operands = []
    for node in list(placeholders(program.relevance.graph.graph))[len(tensors) :]:
        shape = tuple(map(expression, value(node).shape))  # [batch], [batch, K]
        own = [s if isinstance(s, int) else sizes.setdefault(s, _TARGETS) for s in shape]
        operands.append(torch.zeros(own, dtype=value(node).dtype, device=value(node).device))
        changing.append({i: free for i, s in enumerate(shape) if not isinstance(s, int)})
    return [*tensors, *operands], changing


def _grown(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor repeated to a shape."""
    for i, size in enumerate(shape):
        index = list(itertools.islice(itertools.cycle(range(tensor.shape[i])), size))
        tensor = tensor.index_select(i, torch.tensor(index, device=tensor.device))
    return tensor.contiguous()

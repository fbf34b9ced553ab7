"""Fake values for the nodes of a loaded graph: backends that compile ask for dtypes and symbolic shapes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ..compiler.graphs import computing, placeholders, value
from ..errors import ArtifactError, InputError, first_line
from .expressions import Sizes, evaluate
from .graph import DTYPES
from .header import Header
from .spec import Kind

#: What sizes that may change are taken for: each another one, so that each is a symbol of its own.
_TRIED = (11, 13, 17, 19, 8, 16, 32, 64, 128, 4, 6, 3, 2, 256, 512, 1024)
_TRIES = 10_000
#: The number of targets, where any will do.
_TARGETS = 7


def with_values(module: fx.GraphModule, header: Header, target: Kind, place: torch.device) -> fx.GraphModule:
    """The graph, with what each node computes: fake tensors whose sizes are symbols where they may change.

    Raises:
        ArtifactError: an op does not take what the graph gives it.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = list(placeholders(module.graph))
    operands = len(inputs) - len(header.inputs.names)
    shapes = _shapes(header, target, operands)
    dtypes = [*(DTYPES[name] for name in header.inputs.dtypes), *[torch.long] * operands]
    for node, shape, dtype in zip(inputs, shapes, dtypes, strict=True):
        given = torch.empty([n for n, _ in shape], dtype=dtype, device=place)
        changes = [DimDynamic.DUCK if changing else DimDynamic.STATIC for _, changing in shape]
        context: Any = StatelessSymbolicContext(dynamic_sizes=changes)
        node.meta["val"] = mode.from_tensor(given, symbolic_context=context, source=ConstantSource(node.name))
    try:
        with computing(mode):
            for node in module.graph.nodes:
                if node.op == "get_attr":
                    node.meta["val"] = mode.from_tensor(getattr(module, str(node.target)), static_shapes=True)
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
                    node.meta["val"] = node.target(*args, **kwargs)
    except Exception as error:  # whatever an op says to operands that do not fit
        raise ArtifactError(f"The artifact's program does not fit together: {first_line(error)}.") from error
    return module


def _shapes(header: Header, target: Kind, operands: int) -> list[list[tuple[int, bool]]]:
    """Sizes of inputs and operands, and which may change."""
    sizes = header.inputs.sizes
    symbols = _hints(sizes)
    found = [
        [(int(evaluate(size, symbols)), not isinstance(size, int)) for size in shape]
        for shape in sizes.shapes
    ]
    if header.logits is None:
        return found
    batch = header.logits.shape[0]
    row = (int(evaluate(batch, symbols)), not isinstance(batch, int))
    many = (target.count or _TARGETS, target.count is None)
    if target.fields is None:
        return [*found, *([row] for _ in range(operands))]
    positions = [[row, many][: target.position]] if target.position else []
    return [*found, *positions, *([row, many] for _ in range(target.fields))]


def _hints(sizes: Sizes) -> Mapping[str, int]:
    """Sizes for the symbols that fulfil the conditions, as many different ones as these allow."""
    names = sorted(sizes.symbols)
    any_sizes = itertools.islice(itertools.product(_TRIED, repeat=len(names)), _TRIES)
    for chosen in sorted(any_sizes, key=lambda sizes: -len(set(sizes))):
        symbols = dict(zip(names, chosen, strict=True))
        if all(_in_range(symbols[n], *pair) for n, pair in sizes.ranges.items()) and _hold(sizes, symbols):
            return symbols
    raise ArtifactError("No sizes fulfil the artifact's conditions: load it with backend='eager'.")


def _in_range(size: int, low: int, high: int | None) -> bool:
    return low <= size and (high is None or size <= high)


def _hold(sizes: Sizes, symbols: Mapping[str, int]) -> bool:
    try:
        whole: Sequence[Any] = [evaluate(s, symbols) for shape in sizes.shapes for s in shape]
        return all(w >= 1 and w.denominator == 1 for w in whole) and all(
            evaluate(c, symbols) for c in sizes.conditions
        )
    except InputError:
        return False

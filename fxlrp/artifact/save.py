"""Save: an explainer's programs as one file that needs neither the model's code nor pickle to be read."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..compiler.faithful import compare, run_model
from ..compiler.graphs import placeholders
from ..compiler.inputs import Bound, constants_of
from ..compiler.pipeline import Program
from ..compiler.plan import Plan
from ..compiler.shapes import expression
from ..errors import ArtifactError, CompositeError
from ..rules import Composite
from ..rules.serial import rule_text
from ..seeding import reading_of
from ..traces import Call, Trace
from . import expressions, graph, weights
from .aot import compiled
from .header import FORMAT, MANIFEST, PROGRAM
from .spec import PLAIN, Inputs, Kind, Logits, Results
from .strict import dump

#: The most sizes of 1 that are compared with the model, in all combinations.
_SYMBOLS = 4


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    composite: Composite,
    last: Call,
    programs: Sequence[tuple[Any, int | None, Program]],
    *,
    aot: bool = False,
) -> None:
    """Write programs of one trace and one composite.

    Args:
        path: of the file.
        model: what they explain; a batch or sequence of 1 is compared with it here.
        composite: their rules.
        last: the last call, whose inputs and other arguments the programs take.
        programs: the key of each one's targets, how many targets it is for (None for any), the program.
        aot: whether native code is put beside the first program.

    Raises:
        ArtifactError: a program calls or holds what no artifact may.
    """
    if sys.byteorder != "little":
        raise ArtifactError("Artifacts are written on little-endian machines.")
    if not last.serves_others:
        raise ArtifactError(
            "The last call's program is a trace of that very input, since the model branches on values; it "
            "explains no other. plan.notes says why it was not captured for more."
        )
    _check_ones(model, last.trace, last.bound)
    constants = weights.Pieces()
    inputs = len(last.bound.names)
    written = [_program(key, count, program, inputs, constants) for key, count, program in programs]
    views, pieces = constants.packed()
    stored = dict(pieces)
    if aot:
        stored |= compiled(programs[0][2], last)
    reading = reading_of(last.trace, last.bound)
    logits = reading and Logits(
        tuple(expressions.to_data(expression(size)) for size in reading.shape),
        reading.mask,
        reading.is_padding,
        reading.ids,
    )
    program = dump(
        {
            "inputs": _inputs(model, last).to_data(),
            "logits": logits and logits.to_data(),
            "composite": {"title": composite.title, "json": _composite(composite)},
            "constants": [view.to_data() for view in views],
            "programs": written,
        }
    )
    manifest = dump(
        {
            "format": FORMAT,
            "fxlrp": __version__,
            "torch": str(torch.__version__),
            "program": hashlib.sha256(program.encode()).hexdigest(),
            "tensors": {name: weights.digest(tensor) for name, tensor in stored.items()},
        }
    )
    weights.write(Path(path), stored, {MANIFEST: manifest, PROGRAM: program})


def _program(
    key: Any, count: int | None, program: Program, inputs: int, constants: weights.Pieces
) -> dict[str, Any]:
    module = program.relevance.graph

    def number(node: torch.fx.Node) -> int:
        found: Any = module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return constants.add(str(node.target), found)

    relevance = program.relevance
    results = Results(relevance.names, relevance.positions, relevance.latents, relevance.parameters)
    return {
        "target": Kind.of(key, count).to_data(),
        "operands": len(list(placeholders(module.graph))) - inputs,
        "results": results.to_data(),
        "graph": graph.to_data(module.graph, number),
        "plan": _plan(program.plan),
    }


def _plan(plan: Plan) -> dict[str, Any]:
    rows = [
        [r.node, r.op, r.kind, r.rule.name, rule_text(r.rule), r.reason, r.module, r.source]
        for r in plan.rows
    ]
    return {"rows": rows, "notes": [*plan.notes, *plan.idle]}


def _composite(composite: Composite) -> str | None:
    """The composite as JSON; None for one with rules or selectors that are no plain data."""
    try:
        return composite.to_json()
    except (CompositeError, TypeError, ValueError):
        return None


def _inputs(model: nn.Module, last: Call) -> Inputs:
    bound, trace = last.bound, last.trace
    signature = inspect.signature(model.forward)
    parameters = tuple(
        (p.name, str(p.kind.name), p.default is not inspect.Parameter.empty)
        for p in signature.parameters.values()
    )
    constants = {
        name: v
        if type(v) in PLAIN and v == v and v not in (float("inf"), -float("inf"))
        else {"type": type(v).__name__}
        for name, v in constants_of(bound, signature).items()
    }
    return Inputs(
        type(model).__name__,
        parameters,
        bound.names,
        tuple(str(t.dtype).removeprefix("torch.") for t in bound.tensors),
        str(bound.tensors[0].device),
        expressions.Sizes.of(trace.shapes, trace.verified),
        constants,
    )


def _check_ones(model: nn.Module, trace: Trace, bound: Bound) -> None:
    """Compare the trace with the model where sizes that may change are 1: tracing took them for 2 or more.

    What does not compare equal is left out of ``trace.verified``, and a loaded artifact refuses it.
    """
    shapes = trace.shapes
    symbols = list(
        dict.fromkeys(s for shape in shapes.sizes for s in shape if getattr(s, "is_Symbol", False))
    )
    if len(symbols) > _SYMBOLS:
        return
    for count in range(1, len(symbols) + 1):
        for chosen in itertools.combinations(symbols, count):
            narrowed = replace(
                bound,
                tensors=tuple(
                    _narrowed(t, shape, chosen) for t, shape in zip(bound.tensors, shapes.sizes, strict=True)
                ),
            )
            pattern = tuple(size == 1 for t in narrowed.tensors for size in t.shape)
            if pattern in trace.verified or not shapes.admit(narrowed.tensors):
                continue
            try:
                if compare(trace.captured.graph, narrowed, run_model(model, narrowed)) is None:
                    trace.verified.add(pattern)
            except Exception:  # the model itself may take no such input
                continue


def _narrowed(tensor: Tensor, shape: Sequence[Any], chosen: Sequence[Any]) -> Tensor:
    for i, size in enumerate(shape):
        if size in chosen:
            tensor = tensor.narrow(i, 0, 1)
    return tensor.contiguous()

"""What an explainer keeps between calls: traces of the model, programs made of them, and the last call's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compiler.canonicalize import Canonical
from .compiler.capture import Captured
from .compiler.graphs import placeholders, value
from .compiler.inputs import Bound
from .compiler.lower import Runner
from .compiler.pipeline import Program
from .compiler.shapes import Shapes


@dataclass(frozen=True, eq=False)
class Trace:
    """A captured model and the inputs it is valid for.

    Attributes:
        captured: the captured graph.
        canonical: the canonical one.
        verified: sizes of 1 with which it was compared with the model.
        values: the very inputs that a trace of one input is valid for.
        admitted: sizes that were found valid.
        output_shapes: shapes of outputs for such sizes.
        fixed_counts: kinds of several targets whose programs serve one number of targets each, and why.
    """

    captured: Captured
    canonical: Canonical
    verified: set[tuple[bool, ...]]
    values: tuple[Tensor, ...] | None
    admitted: set[Any] = field(default_factory=set)
    output_shapes: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    fixed_counts: dict[Any, str] = field(default_factory=dict)

    def is_spoilt(self) -> bool:
        """Whether what was built on the trace fixed sizes that it was captured as changeable."""
        now, then = self.shapes.sizes, self.captured.shapes.sizes
        return any(
            isinstance(size, int) and not isinstance(before, int)
            for sizes, earlier in zip(now, then, strict=True)
            for size, before in zip(sizes, earlier, strict=True)
        )

    @property
    def shapes(self) -> Shapes:
        """For which sizes the trace is valid; building on it may have added conditions."""
        return Shapes.of([value(node) for node in placeholders(self.captured.graph.graph)])

    def admits(self, bound: Bound) -> bool:
        """Whether the trace may be used for these inputs."""
        sizes = tuple(t.shape for t in bound.tensors)
        if sizes not in self.admitted:
            if not self.shapes.admit(bound.tensors):
                return False
            self.admitted.add(sizes)
        return self.values is None or all(map(torch.equal, self.values, bound.tensors))


@dataclass(frozen=True, eq=False)
class Compiled:
    """A program, how it is run, whether it is more than a trace of one very input, and its trace."""

    program: Program
    runner: Runner
    serves_others: bool
    trace: Trace


@dataclass(frozen=True, eq=False)
class Call:
    """What a call used; a later one inside ``torch.compile`` uses the same.

    Attributes:
        program: what was compiled for it.
        names: of its tensor inputs, in the program's order.
        constants: its other arguments by name.
        target: the kind of its target.
        serves_others: whether the program is not a trace of that very input.
        trace: of the program.
        bound: its inputs.
    """

    program: Program
    names: tuple[str, ...]
    constants: Mapping[str, Any]
    target: Any
    serves_others: bool
    trace: Trace
    bound: Bound

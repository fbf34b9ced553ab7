"""Refusal of what is not finite, with the place where it arose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .compiler.inputs import Bound
from .compiler.pipeline import Program
from .compiler.provenance import module_path, source_line
from .errors import FxlrpError, NonFiniteError, place


def refuse_nonfinite(
    bound: Bound, program: Program | None, relevance: Sequence[Tensor], scalar: Tensor
) -> None:
    """Refuse NaN and infinity in inputs, the explained value or relevance; the program tells where it arose.

    Raises:
        NonFiniteError: with the input or the first node that holds one.
    """
    total = sum(
        (r.detach().float().abs().sum() for r in relevance), start=scalar.detach().float().abs().sum()
    )
    if bool(torch.isfinite(total)):
        return
    for name, tensor in bound.by_name.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"Input '{name}' contains NaN or infinity.")
    if bool(torch.isfinite(scalar).all()):
        raise NonFiniteError(
            "The explained value is finite but relevance is not: a coefficient overflowed, as half "
            "precision and rules that are not conservative can do. "
            "Explain in bfloat16 or float32, or use composite='cp'."
        )
    where = _first_nonfinite(program, bound) if program is not None else ""
    raise NonFiniteError(f"The model's output is NaN or infinite on this input{where}.")


def _first_nonfinite(program: Program, bound: Bound) -> str:
    class Finder(fx.Interpreter):
        found: fx.Node | None = None

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if (
                self.found is None
                and n.op == "call_function"
                and isinstance(result, Tensor)
                and result.is_floating_point()
                and n in program_nodes
                and not bool(torch.isfinite(result).all())
            ):
                self.found = n
            return result

    rows = {row.node for row in program.plan}
    program_nodes = {n for n in program.rule_graph.graph.nodes if n.name in rows}
    finder = Finder(program.rule_graph)
    try:
        with torch.no_grad():
            finder.run(*bound.tensors)
    except FxlrpError:
        raise
    except Exception:  # the finder only improves a message
        return ""
    if finder.found is None:
        return ""
    return (
        f"; first at '{finder.found.name}' in {place(module_path(finder.found), source_line(finder.found))}"
    )

"""Latents: the node that computes a module's output, by module path, without hooks."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import Tensor, fx

from ..errors import InputError
from .graphs import is_float, value
from .provenance import modules


def module_outputs(module: fx.GraphModule) -> dict[str, str]:
    """The name of the node that computes each module's output, by module path."""
    last: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and is_float(node) and isinstance(value(node), Tensor):
            for path, _ in modules(node):
                last[path] = node.name
    return last


def find(module: fx.GraphModule, patterns: Sequence[str]) -> dict[str, str]:
    """Module paths that match the patterns, and the name of the node that computes each one's output.

    A module's output is the last floating point tensor that is computed inside it.

    Raises:
        InputError: a pattern matches no module of the graph.
    """
    last = module_outputs(module)
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = {path: name for path, name in last.items() if fnmatch.fnmatchcase(path, pattern)}
        if not matched:
            raise InputError(
                f"latents: no module matches {pattern!r}. Modules: {', '.join(list(last)[:8])}, …"
            )
        found.update(matched)
    return found

"""Latents: nodes inside the model whose relevance is returned too, by module path, node or kind; no hooks."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from ..errors import InputError
from ..rules import Selector, kind_of
from ..rules.activation import op_name
from .graphs import is_float, value
from .locate import on_graph, site_of
from .provenance import module_path, modules


def module_outputs(module: fx.GraphModule) -> dict[str, str]:
    """The name of the node that computes each module's output, by module path.

    A module's output is the last floating point tensor that is computed inside it.
    """
    last: dict[str, str] = {}
    for node in _tensors(module):
        for path, _ in modules(node):
            last[path] = node.name
    return last


def find(module: fx.GraphModule, wanted: Sequence[str | Selector]) -> dict[str, str]:
    """What to call each latent, and the name of its node.

    Args:
        module: the canonical graph.
        wanted: module paths (a module's output) or names of nodes, with wildcards, or selectors of nodes. A
            selector's nodes are called by module path and op: ``"model.layers.0.self_attn:attention"``.

    Raises:
        InputError: nothing matches; with what is near.
    """
    found: dict[str, str] = {}
    for one in wanted:
        matched = _by_name(module, one) if isinstance(one, str) else _by_selector(module, one)
        if not matched:
            raise InputError(_message(module, one))
        found.update(matched)
    return found


def _by_name(module: fx.GraphModule, pattern: str) -> dict[str, str]:
    known = module_outputs(module)
    return _matching(known, pattern) or _matching({n.name: n.name for n in _tensors(module)}, pattern)


def _matching(known: Mapping[str, str], pattern: str) -> dict[str, str]:
    return {name: at for name, at in known.items() if fnmatch.fnmatchcase(name, pattern)}


def _by_selector(module: fx.GraphModule, selector: Selector) -> dict[str, str]:
    sites = {node: site_of(node, kind_of(node.target)) for node in _tensors(module)}
    chosen = on_graph(selector, sites)
    found: dict[str, str] = {}
    for node, site in sites.items():
        if chosen.matches(site):
            label = f"{module_path(node)}:{op_name(node.target)}"
            same = sum(name == label or name.startswith(f"{label}_") for name in found)
            found[f"{label}_{same}" if same else label] = node.name
    return found


def _tensors(module: fx.GraphModule) -> list[fx.Node]:
    return [
        n
        for n in module.graph.nodes
        if n.op == "call_function" and is_float(n) and isinstance(value(n), Tensor)
    ]


def _message(module: fx.GraphModule, wanted: str | Selector) -> str:
    paths = list(module_outputs(module))
    if isinstance(wanted, Selector):
        return f"latents: no node matches {wanted}. Modules: {', '.join(paths[:8])}, …"
    near = difflib.get_close_matches(wanted, [*paths, *(n.name for n in _tensors(module))], 4, cutoff=0.5)
    return (
        f"latents: no module and no node matches {wanted!r}."
        + (f" Did you mean {', '.join(map(repr, near))}?" if near else "")
        + f" Modules: {', '.join(paths[:8])}, …"
    )

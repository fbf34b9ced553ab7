"""Where a node comes from: the module it runs in and the line of the model's source."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def module_path(node: fx.Node) -> str:
    """Path of the node's innermost module, as ``model.named_modules()`` gives it; '' if unknown."""
    stack = modules(node)
    return stack[-1][0] if stack else ""


def modules(node: fx.Node) -> list[tuple[str, str]]:
    """Paths and types of the modules around a node, outermost first, the model itself left out."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        # The capture wraps the model as its only child, so every path starts with that child's name.
        path = re.sub(r"^(L\['self'\]\.)?_?model\.?", "", path, count=1)
        if path:
            found.append((path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"))
    return found


def source_line(node: fx.Node) -> str:
    """``file:line in function`` of the model's code that made the node, or ''."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    # torch.nn's own frames say less than the line of the model that called them.
    own = [f for f in frames if "/torch/" not in f["file"] and "/fxlrp/compiler/" not in f["file"]] or [
        f for f in frames if "/fxlrp/compiler/" not in f["file"]
    ]
    if not own:
        return ""
    frame = own[-1]
    return f"{'/'.join(frame['file'].split('/')[-3:])}:{frame['line']} in {frame['function']}"


def inherit(new: fx.Node, old: fx.Node, stage: str) -> fx.Node:
    """Give a node the provenance of the one that it replaces; returns the new node."""
    new.meta = {key: old.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in old.meta}
    new.meta["made_by"] = stage
    return new

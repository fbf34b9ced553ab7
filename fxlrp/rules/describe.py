"""Presets as tables, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping

from .presets import PRESETS, Preset
from .serial import rule_text
from .table import KINDS

#: What a preset says beyond its rules by kind: the field, and how it reads where it is on and off.
_FLAGS = (
    ("freezes_gates", "gate in `act(gate) * up`", "frozen", ""),
    ("freezes_gated", "product gated by an activation", "Freeze", ""),
    ("freezes_scans", "decay, step, B, C of a scan", "frozen", ""),
    ("positional", "rotary tables, position embeddings", "explained", ""),
    ("allows_any_op", "op without a row", "Gradient", "error"),
)


def listing(presets: Mapping[str, Preset] = PRESETS) -> str:
    """Each preset with its source, a line each."""
    width = max(map(len, presets))
    return "\n".join(f"{title:<{width}}  {p.source}" for title, p in presets.items())


def matrix(presets: Mapping[str, Preset] = PRESETS) -> str:
    """Presets as a Markdown table, a row a preset and a column a kind of op.

    Kinds that all presets treat alike share a line above the table.
    """
    shown = [kind for kind in KINDS if len({p.rules[kind] for p in presets.values()}) > 1]
    same = [k for k in KINDS if k not in shown]
    first = next(iter(presets.values()))
    lines = ["The same in all: " + ", ".join(f"`{k}` {rule_text(first.rules[k])}" for k in same) + ".", ""]
    lines += ["| preset | entries before | " + " | ".join(f"`{k}`" for k in shown) + " | besides |"]
    lines += ["|---" * (len(shown) + 3) + "|"]
    for title, p in presets.items():
        entries = "; ".join(f"{s} → {rule_text(r)}" for s, r in p.entries).replace("|", "or")
        flags = [f"{what}: {on if getattr(p, name) else off}" for name, what, on, off in _FLAGS]
        besides = "; ".join(f for f in flags if not f.endswith(": "))
        rules = " | ".join(rule_text(p.rules[k]).removesuffix("()") for k in shown)
        lines.append(f"| `{title}` | {entries} | {rules} | {besides} |")
    return "\n".join(lines)

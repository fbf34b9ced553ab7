"""Totals and the coverage document from rows' results."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .check import COMPOSITES, FORWARD, GRADIENT, LEDGER, STATUSES
from .rows import TASKS

Result = dict[str, Any]
_EXPLAINED, _NOT_BUILT = STATUSES[0], STATUSES[-1]


def load(path: Path) -> dict[tuple[str, str], Result]:
    """Results by task and model; of several for one row the last."""
    if not path.exists():
        return {}
    results = map(json.loads, filter(None, path.read_text().splitlines()))
    return {(r["task"], r["model"]): r for r in results}


def totals(results: Iterable[Result]) -> list[str]:
    """The headline figures, a line each."""
    results = list(results)
    pixels = [r for r in results if TASKS[r["task"]].inputs == "image-text"]
    others = [r for r in results if TASKS[r["task"]].inputs != "image-text"]
    built = [r for r in results if TASKS[r["task"]].inputs == "text" and r["status"] != _NOT_BUILT]
    answered = [
        r for r in built if r.get("generalises", False) is not None
    ]  # None: the model itself does not
    seconds = [r["seconds"] for r in results if r["status"] == _EXPLAINED]
    lines = [
        f"text, image, audio, sequence to sequence: {_share(others, _is_explained)}",
        f"image and text by pixels: {_share(pixels, _is_explained)}",
        "text rows whose one graph answers other batch sizes and lengths: "
        + _share(answered, lambda r: bool(r.get("generalises"))),
    ]
    if seconds:
        lines.append(f"median time to capture, plan and rewrite: {statistics.median(seconds):.1f} s")
    counts = Counter(r["status"] for r in results)
    lines.append(", ".join(f"{status} {counts[status]}" for status in STATUSES if counts[status]))
    return lines


def markdown(results: Iterable[Result], versions: str) -> str:
    """The coverage document."""
    order = {name: i for i, name in enumerate(TASKS)}
    results = sorted(results, key=lambda r: (order[r["task"]], r["model"]))
    sections = [_HEAD, *(f"- {line}" for line in totals(results)), "", *_by_task(results), "", versions]
    for name in TASKS:
        of_task = [r for r in results if r["task"] == name]
        if of_task:
            sections += ["", f"## {name}: {TASKS[name].auto}", "", *_rows(of_task)]
    return "\n".join(sections) + "\n"


_HEAD = f"""\
# Coverage of the transformers library

Every architecture that an auto-mapping of the library lists, built tiny from its config with random weights
and explained with {", ".join(f"`{name}`" for name in COMPOSITES)} by
`python -m bench.zoo --all --markdown docs/coverage.md`.

*Explained* means that, with `strict=True` and in fp32, the model was captured; every nonlinear op has a rule;
the explained value equals the model's own to {FORWARD:.0e}; `gradient` equals autograd's Gradient × Input,
at the embedding lookup of ids and at pixels and audio, to {GRADIENT:.0e} of the largest relevance of a place,
its parts taken without sign (behind a norm those of an embedding sum to rounding); and each composite's
ledger closes to {LEDGER:.0e} of the explained value. Shares are among the models that run; those that this
harness could not build or call are listed as *not built*. *Other sizes*: whether the same graph answers
another batch size and length, again equal to autograd.
"""


def _is_explained(result: Result) -> bool:
    return bool(result["status"] == _EXPLAINED)


def _share(results: list[Result], good: Callable[[Result], bool]) -> str:
    built = [r for r in results if r["status"] != _NOT_BUILT]
    count = sum(map(good, built))
    return f"{count} of {len(built)}" + (f" ({count / len(built):.1%})" if built else "")


def _by_task(results: list[Result]) -> list[str]:
    failures = STATUSES[1:]
    titles = [s.replace("_", " ") for s in failures]
    lines = [
        f"| task | explained | {' | '.join(titles)} | dynamic / static / trace |",
        "|---" * (len(failures) + 3) + "|",
    ]
    for name in TASKS:
        of_task = [r for r in results if r["task"] == name]
        if of_task:
            counts = Counter(r["status"] for r in of_task)
            steps = Counter(r["capture"] for r in of_task if _is_explained(r))
            cells = [name, _share(of_task, _is_explained), *(str(counts[s] or "–") for s in failures)]
            cells.append(" / ".join(str(steps[s]) for s in ("dynamic", "static", "trace")))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rows(results: list[Result]) -> list[str]:
    lines = [
        "| model | status | capture | other sizes | nodes by rule | gradient | ledger | seconds | reason |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        rules = ", ".join(f"{name} {count}" for name, count in r.get("rules", {}).items())
        cells = [
            r["model"],
            r["status"].replace("_", " "),
            r.get("capture", "–"),
            {True: "yes", False: "no"}.get(r.get("generalises"), "–"),  # type: ignore[arg-type]
            rules or "–",
            _number(max(r.get("gradient", {}).values(), default=None)),
            _number(max(r.get("ledger", {}).values(), default=None)),
            f"{r['seconds']:.1f}" if "seconds" in r else "–",
            _cell("; ".join(filter(None, [r["reason"], *r.get("notes", ())]))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 240 else text[:239] + "…"

"""What all benchmarks found, as one Markdown table with the limits below it, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import cold_start, end_to_end, memory, precision, targets

GRADIENT = end_to_end.GRADIENT
#: Columns of times, as tables call them, and contenders by part.
TIMES = {
    "forward": "forward",
    "products": "products",
    "fxlrp eager": "fxlrp, eager",
    "fxlrp inductor": "fxlrp, inductor",
    "fxlrp, least memory": "fxlrp, least memory",
    "LXT": "LXT",
    "LXT, frozen": "LXT, frozen weights",
    "Captum InputXGradient": "Captum InputXGradient",
    "Captum IntegratedGradients(20)": "Captum IG(20)",
}
#: What the peers' part calls what the others call differently.
_SAME = {"fxlrp": "fxlrp eager"}
#: What an explanation may take over LXT: time (as its README calls it), memory by default, memory and time
#: of the least.
LXT_TIME, LXT_MEMORY, LXT_LEAST, LXT_LEAST_TIME = 0.6, 0.7, 0.3, 1.4
_LONG = 2048
#: Contenders of others, and the libraries whose versions are told.
_PEERS, _LIBRARIES = ("LXT", "Captum", "zennit"), ("lxt", "captum", "zennit", "transformers")

Results = Mapping[str, Mapping[str, Any]]


class Figure(NamedTuple):
    """A figure with what it must not exceed, if there is such a limit."""

    what: str
    found: float
    limit: float | None


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by part, of the parts that have run."""
    return {
        path.name.removesuffix("_cpu.json"): json.loads(path.read_text())
        for path in sorted(folder.glob("*_cpu.json"))
    }


def rows(results: Results) -> list[dict[str, Any]]:
    """A row for each model, batch and length: times over eager Gradient x Input, peak MiB, first seconds."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for part in ("end_to_end", "peers"):
        for result in results.get(part, {}).get("results", ()):
            if GRADIENT not in result["seconds"]:
                continue
            key = (result["subject"], result["batch"], result["length"])
            row = found.setdefault(key, {"time": {}, "memory": {}, "first": {}})
            for into, source in (
                ("time", f"over {GRADIENT}"),
                ("memory", "peak MiB"),
                ("first", "first s"),
            ):
                for name, value in result.get(source, {}).items():
                    row[into].setdefault(_SAME.get(name, name), value)
    return [
        {"subject": subject, "batch": batch, "length": length, **row}
        for (subject, batch, length), row in sorted(found.items(), key=lambda item: _order(item[0]))
    ]


def _order(key: tuple[str, int, int]) -> tuple[int, int, int]:
    names = [subject.name for subject in end_to_end.SUBJECTS]
    return (names.index(key[0]) if key[0] in names else len(names), key[1], key[2])


def figures(results: Results) -> Iterator[Figure]:
    """Every figure that has a limit."""
    for cell in results.get("end_to_end", {}).get("results", ()):
        where = f"{cell['subject']}, {cell['batch']}x{cell['length']}"
        for what, (found, limit) in end_to_end.limits(cell).items():
            yield Figure(f"{where}: {what}", found, limit)
    for cell in results.get("peers", {}).get("results", ()):
        yield from _over_lxt(cell)
    if "cold_start" in results:
        cold = [r for r in results["cold_start"]["results"] if r["cache"] == "cold"]
        few, many = cold[0], cold[-1]
        what = f"first explanation, inductor: {many['layers']} layers over {few['layers']}"
        yield Figure(what, many["seconds"] / few["seconds"], cold_start.LIMIT)
    if "memory" in results:
        by_name = {r["contender"]: r for r in results["memory"]["rows"]}
        base = by_name[memory.AUTOGRAD]["peak MiB"]
        for name, (most, slow) in memory.LIMITS.items():
            yield Figure(f"peak memory, {name}, over {GRADIENT}", by_name[name]["peak MiB"] / base, most)
            if name != "default":
                yield Figure(
                    f"time, {name} memory, over the default", by_name[name]["time over default"], slow
                )
    for result in results.get("targets", {}).get("results", ()):
        what = f"{result['targets']} targets in one call over as many: {result['workload']}"
        yield Figure(what, result["ratio"], targets.LIMIT)
    found = results.get("precision", {}).get("results", ())
    for dtype in dict.fromkeys(r["dtype"] for r in found):
        worst = max((r for r in found if r["dtype"] == dtype), key=lambda r: r["error"] / r["autograd"])
        what = (
            f"error against float64, {dtype}, over {GRADIENT}'s, worst of {len(found) // 2}: {worst['model']}"
        )
        yield Figure(what, worst["error"] / worst["autograd"], precision.LIMIT)


def _over_lxt(cell: Mapping[str, Any]) -> Iterator[Figure]:
    peaks, where = cell.get("peak MiB", {}), cell["workload"]
    for rule in ("epsilon", "gamma"):
        if f"over zennit {rule}" in cell:
            found = cell[f"over zennit {rule}"][f"fxlrp {rule}"]
            yield Figure(f"{where}: fxlrp {rule} over zennit {rule}", found, None)
    for lxt in ("LXT", "LXT, frozen"):
        for ours in ("fxlrp", "fxlrp inductor"):
            if ours in cell.get(f"over {lxt}", {}):
                what = f"{where}: {TIMES[_SAME.get(ours, ours)]} over {TIMES[lxt]}"
                yield Figure(what, cell[f"over {lxt}"][ours], LXT_TIME if lxt == "LXT" else None)
    least, frozen = "fxlrp, least memory", "LXT, frozen"
    if cell["length"] >= _LONG and frozen in peaks:
        yield Figure(f"{where}: peak memory over LXT's", peaks["fxlrp"] / peaks[frozen], LXT_MEMORY)
        yield Figure(f"{where}: least peak memory over LXT's", peaks[least] / peaks[frozen], LXT_LEAST)
        yield Figure(f"{where}: time in least memory", cell["over fxlrp"][least], LXT_LEAST_TIME)


def markdown(results: Results) -> str:
    """The table and the limits."""
    found = rows(results)
    names = [name for name in TIMES if any(name in row["time"] for row in found)]
    lines = [
        "Times over eager Gradient × Input by autograd, medians of interleaved runs; peak memory above the",
        "loaded model over that of Gradient × Input; seconds to the first explanation of a fresh process.",
        "`products`: the matrix products of fxlrp's own graph alone. LXT as its README calls it, where",
        "weights ask for gradients, and with frozen weights, which is also how its memory is measured.",
        "",
        f"| model | batch x length | {' | '.join(TIMES[n] for n in names)} | memory: fxlrp | least | LXT | "
        "first: eager | inductor |",
        f"|---|---|{'---|' * len(names)}---|---|---|---|---|",
    ]
    for row in found:
        base = row["memory"].get(GRADIENT)
        cells = [_shown(row["time"].get(name)) for name in names]
        for name in ("fxlrp eager", "fxlrp, least memory", "LXT, frozen"):
            peak = row["memory"].get(name)
            cells.append(_shown(None if peak is None or base is None else peak / base))
        cells += [_shown(row["first"].get(name), 1) for name in ("fxlrp eager", "fxlrp inductor")]
        lines.append(f"| {row['subject']} | {row['batch']}x{row['length']} | {' | '.join(cells)} |")
    lines += ["", "| figure | found | limit | |", "|---|---|---|---|"]
    lines += [
        f"| {f.what} | {f.found:.2f} | | |"
        if f.limit is None
        else f"| {f.what} | {f.found:.2f} | ≤ {f.limit:g} | {'' if f.found <= f.limit else 'over'} |"
        for f in figures(results)
    ]
    measured = {part: data["versions"] for part, data in results.items() if "versions" in data}
    said = measured.get("end_to_end", next(iter(measured.values()), {}))
    lines += ["", ", ".join(f"{k} {v}" for k, v in said.items() if k != "load")]
    for name, version in sorted(_peers(results).items()):
        lines[-1] += f", {name} {version} (peers)"
    return "\n".join(lines)


def _peers(results: Results) -> dict[str, str]:
    """Versions of the peers' libraries."""
    found: dict[str, str] = {}
    for cell in results.get("peers", {}).get("results", ()):
        for contender, versions in cell["versions"].items():
            if contender.split()[0] in _PEERS:
                found |= {k: v for k, v in versions.items() if k in _LIBRARIES}
    return found


def _shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def plot(results: Results, path: Path) -> None:
    """Times over Gradient x Input, a line of dots for each model, batch and length."""
    from matplotlib.figure import Figure as Canvas

    found = rows(results)
    names = [name for name in TIMES if any(name in row["time"] for row in found)]
    canvas = Canvas(figsize=(9, 1.6 + 0.36 * len(found)), layout="constrained")
    axes = canvas.subplots()
    for name, marker in zip(names, "|xoDsPX^v", strict=False):
        places = [(row["time"][name], i) for i, row in enumerate(found) if name in row["time"]]
        axes.scatter(*zip(*places, strict=True), marker=marker, s=45, label=TIMES[name], zorder=3)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_xscale("log")
    ticks = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks((), minor=True)
    axes.set_yticks(range(len(found)), [f"{r['subject']}, {r['batch']}x{r['length']}" for r in found])
    axes.invert_yaxis()
    axes.grid(axis="both", color="0.9")
    axes.set_xlabel("time over eager Gradient × Input (log scale; less is faster)")
    canvas.legend(loc="outside lower center", ncols=4, frameon=False)
    canvas.savefig(path, dpi=130)


def write(folder: Path) -> str:
    """Write ``summary_cpu.md`` and ``summary_cpu.png`` of the results in a folder; gives the table."""
    results = load(folder)
    text = markdown(results)
    (folder / "summary_cpu.md").write_text(f"{text}\n")
    if rows(results):
        plot(results, folder / "summary_cpu.png")
    return text

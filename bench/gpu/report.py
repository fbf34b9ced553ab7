"""Results as Markdown, and as the table of kernels that were measured to be faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """Lines with their verdicts, then times, then what failed."""
    about = results["about"]
    versions = ", ".join(f"{key} {value}" for key, value in about.items() if key != "device")
    texts = [f"# On a GPU\n\nDevice: {about['device']}; {versions}."]
    rows = [row for part in results["parts"].values() for row in part["rows"]]
    ceilings = [row["ceilings"] for row in rows if "ceilings" in row]
    if ceilings:
        best = {key: max(c[key] for c in ceilings) for key in ceilings[0]}
        texts.append(
            f"A copy moves {best['copy'] / 1e12:.2f} TB/s; a bf16 product of 8192³ runs at "
            f"{best['bf16'] / 1e12:.0f} TFLOP/s."
        )
    texts += [_tests(rows), _lines(rows), _times(rows), _models(rows), _failures(results)]
    return "\n\n".join(filter(None, texts)) + "\n"


def _table(header: str, lines: Iterable[str]) -> str:
    body = list(lines)
    rule = "|" + "---|" * (header.count("|") - 1)
    return "\n".join([header, rule, *body]) if body else ""


def _tests(rows: list[Any]) -> str:
    found = [r for r in rows if "tests" in r]
    return "\n".join(
        f"- {r['what']}: {r['tests'] - r['failures'] - r['errors'] - r['skipped']} of {r['tests']} passed, "
        f"{r['failures'] + r['errors']} failed, {r['skipped']} skipped"
        for r in found
    )


def _lines(rows: list[Any]) -> str:
    return _table(
        "| benchmark | line | figure | verdict |",
        (
            f"| {r['what']} | {one['line']} | {_number(one['figure'])} | {_verdict(one)} |"
            for r in {r["what"]: r for r in rows}.values()  # a model's row comes again as ways are added
            for one in r.get("lines", [])
        ),
    )


def _verdict(line: Mapping[str, Any]) -> str:
    if line["figure"] is None:
        return "unknown"
    return "reached" if line["met"] else "**missed**"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _times(rows: list[Any]) -> str:
    lines = []
    for r in rows:
        if "bytes" not in r:
            continue
        kernel = r["seconds"].get("kernel")
        others = ", ".join(f"{name} {_time(t)}" for name, t in r["seconds"].items() if name != "kernel")
        rate = "" if kernel is None else f"{r['bytes'] / kernel / 1e9:.0f} GB/s"
        if r["flops"] and kernel is not None:
            rate += f", {r['flops'] / kernel / 1e12:.1f} TFLOP/s"
        lines.append(f"| {r['what']} | {'–' if kernel is None else _time(kernel)} | {rate} | {others} |")
    return _table("| benchmark | kernel | rate | others |", lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _models(rows: list[Any]) -> str:
    last = {r["what"]: r for r in rows if "over gradient × input" in r}
    lines = []
    for name, r in last.items():
        for contender, ratio in r["over gradient × input"].items():
            peak = r["peak bytes"][contender]
            memory = "–" if peak is None else f"{peak / 2**20:.0f} MiB"
            lines.append(
                f"| {name} | {contender} | {_time(r['seconds'][contender])} | {ratio:.2f} | {memory} |"
            )
    return _table("| model | way | time | over Gradient × Input | memory above the model |", lines)


def _failures(results: Results) -> str:
    lines = [f"- {name}: {part['ended']}" for name, part in results["parts"].items() if part.get("ended")]
    for part in results["parts"].values():
        for r in part["rows"]:
            lines += [f"- {r['what']}: {_first_line(r['error'])}"] if "error" in r else []
            lines += [f"- {r['what']}, {k}: {_first_line(v)}" for k, v in r.get("failed", {}).items()]
    return "## What failed\n\n" + "\n".join(lines) if lines else ""


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def faster(results: Results) -> dict[str, bool]:
    """Kernel, or case of one → whether it beat every way PyTorch has, in each benchmark that counts.

    A kernel with a benchmark that failed is not faster.
    """
    found: dict[str, bool] = {}
    for part in results["parts"].values():
        for r in part["rows"]:
            if not r.get("decides") or not ("bytes" in r or "error" in r):
                continue
            times = dict(r.get("seconds", {}))
            kernel = times.pop("kernel", None)
            rivals = [t for name, t in times.items() if name in ("eager", "inductor")]
            wins = kernel is not None and bool(rivals) and kernel < min(rivals)
            for name in r["decides"]:
                found[name] = found.get(name, True) and wins
    return found


def table(device: str, kernels: Mapping[str, bool], known: Mapping[str, Mapping[str, bool]]) -> str:
    """The assignment of ``MEASURED`` in ``fxlrp/kernels/measured.py`` with this device's results in it."""
    devices = {**known, device: dict(kernels)}
    lines = [f"        {name!r}: {dict(sorted(of.items()))!r},\n" for name, of in sorted(devices.items())]
    body = "".join(lines).replace("'", '"')
    return f"MEASURED: Final[Mapping[str, Mapping[str, bool]]] = MappingProxyType(\n    {{\n{body}    }}\n)\n"

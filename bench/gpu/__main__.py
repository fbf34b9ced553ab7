"""Everything that a GPU is needed for, in one command of at most eight minutes on an H200.

    python -m bench.gpu --out DIR [--parts rows linear …]
    python -m bench.gpu --dry-run        every gate at tiny sizes, in Triton's interpreter, without a GPU
    python -m bench.gpu --plan           what would run

Writes DIR/results.json, DIR/results.md and DIR/measured.txt: what to put into ``fxlrp/kernels/measured.py``.
Each part runs in a process of its own within a time limit; what fails is recorded and ends nothing else.
Exit status 2 without a CUDA device, 1 where a dry run's gate fails, else 0: lines missed are results too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def main() -> int:
    """Parse, then run a part, all parts, or none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--parts", nargs="*", help="some parts only")
    parser.add_argument("--dry-run", action="store_true", help="gates at tiny sizes, without a GPU")
    parser.add_argument("--plan", action="store_true", help="what would run")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in the process of one part
    options = parser.parse_args()
    has_device = torch.cuda.is_available()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    from .parts import PARTS

    if options.part:
        part = next(p for p in PARTS if p.name == options.part)
        return _print(part.run(torch.device("cuda")))
    if options.dry_run:
        from .parts import dry

        return _print(dry(torch.device("cpu")), gates=True)
    wanted = [p for p in PARTS if not options.parts or p.name in options.parts]
    if options.plan or not has_device:
        for part in wanted:
            print(f"{part.name}, at most {part.limit} s:", *part.plan, sep="\n  ")
    if options.plan:
        return 0
    if not has_device:
        print(
            "\nNo CUDA device here, so nothing was measured. Run `python -m bench.gpu --out DIR` on a "
            "machine with one; `python -m bench.gpu --dry-run` checks everything but speed here.",
            file=sys.stderr,
        )
        return 2
    if options.out is None:
        parser.error("name a folder for the results: --out DIR")
    options.out.mkdir(parents=True, exist_ok=True)
    _all(wanted, options.out)
    return 0


def _print(rows: Any, gates: bool = False) -> int:
    """A line of JSON for each row, as it comes."""
    failed = 0
    for row in rows:
        failed += "error" in row
        print(json.dumps(row), flush=True)
    return int(gates and failed > 0)


def _all(parts: Any, out: Path) -> None:
    from fxlrp.kernels.measured import MEASURED

    from . import report

    start = time.monotonic()
    results: dict[str, Any] = {"about": _about(), "parts": {}}
    until = 0
    for part in parts:
        until += part.limit
        spent = time.monotonic() - start
        print(f"[{spent:3.0f} s] {part.name}", flush=True)
        results["parts"][part.name] = _run(part.name, until - spent)
        (out / "results.json").write_text(json.dumps(results, indent=1))
        (out / "results.md").write_text(report.markdown(results))
    device = results["about"]["device"]
    (out / "measured.txt").write_text(report.table(device, report.faster(results), MEASURED))
    print(f"[{time.monotonic() - start:3.0f} s] done\n\n{report.markdown(results)}", flush=True)


def _run(name: str, limit: float) -> dict[str, Any]:
    """The rows that a part printed until it ended, or was ended."""
    if limit < 5:
        return {"rows": [], "ended": "no time was left for it"}
    command = [sys.executable, "-m", "bench.gpu", "--part", name]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ended = ""
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its own group: the part and what it started
        output, errors = process.communicate()
        ended = f"ended after {limit:.0f} s"
    if process.returncode and not ended:
        ended = f"exit status {process.returncode}: {errors[-1500:]}"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for row in rows:
        print(f"    {row['what']}: {row.get('error', 'done')[-200:]}", flush=True)
    return {"rows": rows, **({"ended": ended} if ended else {})}


def _about() -> dict[str, Any]:
    from ..timing import versions

    torch.cuda.init()
    found = versions()
    try:
        import triton

        found["triton"] = triton.__version__
    except ModuleNotFoundError:
        found["triton"] = "none"
    return {**found, "cuda": torch.version.cuda}


if __name__ == "__main__":
    sys.exit(main())

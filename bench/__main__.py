"""All benchmarks, one after the other, and their summary: one Markdown table and a plot.

    python -m bench [--quick] [--only PART …] [--out bench/results]
    python -m bench --summary            # the summary alone, of results that are there

Each part is a module of its own, ``python -m bench.PART``, which writes ``PART_cpu.json``; wants a quiet
machine and about an hour. The peers (LXT, Captum, zennit) take part where ``make peers`` installed them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .peers.__main__ import PEERS
from .summary import write

#: Modules in the order in which they run; correctness gates are within each.
PARTS = ("end_to_end", "peers", "memory", "cold_start", "targets", "precision")


def main() -> None:
    """Run the parts and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: does everything run?")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="these parts")
    parser.add_argument("--summary", action="store_true", help="run nothing, summarise what is there")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of results"
    )
    options = parser.parse_args()
    failed = []
    for i, part in enumerate(() if options.summary else options.only or PARTS):
        if part == "peers" and not PEERS.is_file():
            print("peers are not installed and left out: make peers", file=sys.stderr)
            continue
        print(f"\n[{i + 1}/{len(options.only or PARTS)}] {part}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", f"bench.{part}", "--out", str(options.out / f"{part}_cpu.json")]
        if subprocess.run([*command, *(["--quick"] if options.quick else [])], check=False).returncode:
            failed.append(part)
    print(write(options.out))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

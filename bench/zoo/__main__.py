"""Explain the zoo: every architecture of the transformers library, tiny, from its config.

    python -m bench.zoo --all --jobs 2 --out bench/results/zoo.jsonl
    python -m bench.zoo --task causal_lm --model llama     one row, with its plan and ledgers
    python -m bench.zoo --markdown docs/coverage.md        the document from what was run before

Results are appended row by row; rows that are there already are skipped unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from .rows import SAMPLE, TASKS, Row, rows, sample

_RESULTS = Path(__file__).parent.parent / "results" / "zoo.jsonl"


def main() -> None:
    """Run what is asked for, print totals, write the document."""
    options = _options()
    from .report import load, markdown, totals

    chosen = _chosen(options)
    if len(chosen) == 1:
        _show(chosen[0])
        return
    known = load(options.out)
    todo = [row for row in chosen if options.again or (row.task, row.model) not in known]
    if todo:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as out:
            for result in _progress(todo, options):
                known[result["task"], result["model"]] = result
                out.write(json.dumps(result) + "\n")
                out.flush()
    wanted = {(row.task, row.model) for row in chosen} or set(known)
    print("\n".join(totals(r for key, r in known.items() if key in wanted)))
    if options.markdown:
        options.markdown.write_text(markdown(known.values(), _versions()))
        print(f"wrote {options.markdown}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every row")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=[], help="all rows of these tasks")
    parser.add_argument("--model", nargs="+", default=[], help="model types as the library calls them")
    parser.add_argument(
        "--sample",
        nargs="?",
        type=Path,
        const=SAMPLE,
        help="rows that a file lists, 'task model' a line (default: those of the tests)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default: 2)")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for each row (default: 180)")
    parser.add_argument("--memory", type=float, default=8.0, help="GB of address space for each (default: 8)")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="JSON lines to append to and resume from")
    parser.add_argument("--again", action="store_true", help="run rows that are there already")
    parser.add_argument("--markdown", type=Path, help="write the coverage document, of all results in --out")
    options = parser.parse_args()
    if not (options.all or options.task or options.model or options.sample or options.markdown):
        parser.error("say which rows: --all, --task, --model or --sample; or --markdown")
    return options


def _chosen(options: argparse.Namespace) -> list[Row]:
    if options.sample:
        return list(sample(options.sample))
    if not (options.all or options.task or options.model):
        return []
    found = rows(options.task, options.model)
    if not found:
        sys.exit(f"no row of {', '.join(options.task) or 'any task'} is called {', '.join(options.model)}")
    return found


def _show(row: Row) -> None:
    """One row in this process: its plan, its ledgers, its result."""
    import torch

    from .check import check

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    result = check(row, print)
    print("\n" + json.dumps(result, indent=1))


def _progress(todo: list[Row], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    from .runner import run

    results = run(todo, jobs=options.jobs, timeout=options.timeout, gigabytes=options.memory)
    explained = 0
    with tqdm(total=len(todo), unit="row", dynamic_ncols=True) as bar:
        for result in results:
            explained += result["status"] == "explained"
            if result["status"] not in ("explained", "not_built"):
                text = f"{result['task']}/{result['model']}: {result['status']}: {result['reason']}"
                bar.write(text[:200], file=sys.stderr)
            bar.set_postfix(explained=explained)
            bar.update()
            yield result


def _versions() -> str:
    import torch
    import transformers

    import fxlrp

    return (
        f"Measured with torch {torch.__version__}, transformers {transformers.__version__}, "
        f"fxlrp {fxlrp.__version__}, CPU, one thread a row."
    )


if __name__ == "__main__":
    main()

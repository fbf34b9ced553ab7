"""The benchmarks' summary: rows joined over parts, limits, the plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.end_to_end import CP, EAGER, GRADIENT, INDUCTOR, PRODUCTS, SUBJECTS
from bench.summary import figures, load, markdown, rows, write

LLAMA = SUBJECTS[0].name


def cell(length: int, eager: float) -> dict[str, Any]:
    names = {GRADIENT: 1.0, EAGER: eager, CP: 0.5, INDUCTOR: 0.6, PRODUCTS: 0.6}
    over = {
        f"over {base}": {n: t / names[base] for n, t in names.items()} for base in (GRADIENT, PRODUCTS, EAGER)
    }
    return {"subject": LLAMA, "batch": 1, "length": length, "seconds": names, **over}


RESULTS: dict[str, Any] = {
    "end_to_end": {
        "versions": {"torch": "2.13", "load": 0.1},
        "results": [
            {**cell(2048, 0.8), "peak MiB": {GRADIENT: 100.0, EAGER: 40.0}, "first s": {EAGER: 3.0}},
            cell(256, 0.7),
        ],
    },
    "peers": {
        "results": [
            {
                "workload": f"{LLAMA}, 1x2048",
                "subject": LLAMA,
                "batch": 1,
                "length": 2048,
                "seconds": {GRADIENT: 1.0, "fxlrp": 0.8, "LXT": 2.0, "fxlrp, least memory": 0.9},
                f"over {GRADIENT}": {"fxlrp": 0.9, "LXT": 2.0, "fxlrp, least memory": 0.9},
                "over LXT": {"fxlrp": 0.7},
                "over LXT, frozen": {"fxlrp": 0.8},
                "over fxlrp": {"fxlrp, least memory": 1.2},
                "peak MiB": {"fxlrp": 80.0, "LXT": 300.0, "LXT, frozen": 100.0, "fxlrp, least memory": 20.0},
                "versions": {"LXT": {"lxt": "2.1"}, "fxlrp": {"fxlrp": "0"}},
            }
        ]
    },
}


def test_rows_join_what_parts_measured() -> None:
    """Breaks if a part's figures get lost or stand in another row, or one part's overwrite another's."""
    first, second = rows(RESULTS)
    assert (first["length"], second["length"]) == (256, 2048)
    assert second["time"][EAGER] == 0.8  # not the peers' 0.9
    assert second["time"]["LXT"] == 2.0
    assert second["first"] == {EAGER: 3.0}


def test_what_is_over_its_limit_is_said() -> None:
    found = {f.what: f for f in figures(RESULTS)}
    assert found[f"{LLAMA}, 1x2048: {EAGER} over {GRADIENT}"].found == 0.8
    assert found[f"{LLAMA}, 1x2048: peak memory over LXT's"].found == pytest.approx(0.8)
    over = [line for line in markdown(RESULTS).splitlines() if line.endswith("| over |")]
    assert {line.split(" | ")[0].removeprefix(f"| {LLAMA}, ") for line in over} == {
        f"1x2048: {EAGER} over {GRADIENT}",
        f"1x2048: {EAGER} over {PRODUCTS}",
        "1x2048: peak memory over LXT's",
        "1x2048: fxlrp, eager over LXT",
    }
    assert found[f"{LLAMA}, 1x2048: fxlrp, eager over LXT, frozen weights"].limit is None


def test_table_and_plot_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for part, data in RESULTS.items():
        (tmp_path / f"{part}_cpu.json").write_text(json.dumps(data))
    assert load(tmp_path) == RESULTS
    text = write(tmp_path)
    assert f"| {LLAMA} | 1x2048 |" in text and "lxt 2.1 (peers)" in text
    assert (tmp_path / "summary_cpu.md").read_text() == f"{text}\n"
    assert (tmp_path / "summary_cpu.png").stat().st_size > 10_000

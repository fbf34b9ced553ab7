"""The benchmark against other libraries: its workers and gate, with our interpreter in the peers' place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.peers import __main__ as peers
from bench.peers.describe import Workload

MLP = Workload("mlp", 32, 32, 2, vocabulary=5, batch=3, length=16)


@pytest.fixture(autouse=True)
def own_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", Path(sys.executable))


def test_workers_are_gated_and_timed_in_rounds() -> None:
    """Breaks if a worker loses its weights, a peer with other relevance is timed, or memory is left out."""
    contest = peers.Contest(
        MLP,
        ("forward", "fxlrp", "fxlrp gradient"),
        {"gradient x input": "fxlrp gradient", "zennit gamma": None, "fxlrp gamma": "fxlrp"},
    )
    result = peers.run(contest, 2, 1e-5, memory=True)
    assert result["gate"]["gradient x input against fxlrp gradient"] < 1e-5
    assert "not the relevance of fxlrp" in result["left out"]["fxlrp gamma"]
    assert "zennit" in result["left out"]["zennit gamma"]
    timed = {"forward", "fxlrp", "fxlrp gradient", "gradient x input"}
    assert result["seconds"].keys() == result["peak MiB"].keys() == timed
    assert result["over forward"]["forward"] == 1
    shown = peers.table([result])
    assert all(f"| {name} |" in shown for name in (*timed, "fxlrp gamma"))


def test_a_worker_that_fails_is_told() -> None:
    """Breaks if an error in a worker hangs the parent or passes for a measurement."""
    worker = peers.Worker(Path(sys.executable), "nobody")
    try:
        with pytest.raises(peers.Failed, match=r"nobody, time: .*load comes first"):
            worker.ask("time")
        with pytest.raises(peers.Failed, match="KeyError"):
            worker.ask("load", workload=MLP.to_data(), **{"with": {"method": "nobody", "weights": ""}})
    finally:
        worker.close()
    assert worker.process.returncode == 0

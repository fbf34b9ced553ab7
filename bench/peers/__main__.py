"""fxlrp beside LXT, Captum and zennit: times and peak memory over a forward pass, after a correctness gate.

    make peers
    python -m bench.peers [--quick] [--only llama …] [--rounds 15] [--out results.json]

Every contender runs in a process of its own, the peers in the environment of ``make peers``, on the same
weights. A round runs each of them once, one after the other, so that runs are interleaved; reported are
medians of ratios within a round. A peer whose relevance is not ours is not timed. Peak memory is that of a
fresh process, above what the loaded model takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..timing import ratio, save, versions
from .describe import Workload, model_of

ROOT = Path(__file__).resolve().parents[2]
#: The peers' interpreter.
PEERS = ROOT / ".peers" / "bin" / "python"


@dataclass(frozen=True)
class Contest:
    """A workload, and who runs on it.

    Attributes:
        workload: the model and its inputs.
        ours: contenders of ours.
        peers: contenders in the peers' environment, with the one of ours whose relevance each must equal, or
            None where we have none of the kind.
    """

    workload: Workload
    ours: tuple[str, ...]
    peers: dict[str, str | None]


_GRADIENT = {"Captum InputXGradient": "fxlrp gradient"}
_CAPTUM = {**_GRADIENT, "Captum IntegratedGradients(20)": None}
_LXT = {"LXT": "fxlrp", "LXT, frozen": "fxlrp"}
_OURS = ("forward", "gradient x input", "fxlrp", "fxlrp inductor", "fxlrp gradient")
_LEAST = ("forward", "gradient x input", "fxlrp", "fxlrp, least memory", "fxlrp gradient")
_LINEAR = {"zennit epsilon": "fxlrp epsilon", "zennit gamma": "fxlrp gamma"}
#: Contenders of ours that must agree.
_SAME = dict.fromkeys(("fxlrp inductor", "fxlrp, least memory"), "fxlrp")
#: What ratios are taken over.
_BASES = (
    "forward",
    "gradient x input",
    "LXT",
    "LXT, frozen",
    "fxlrp",
    "zennit epsilon",
    "zennit gamma",
)
#: Seconds that the rounds of a contest take; at least five rounds are run.
BUDGET = 25.0


def contests(*, quick: bool) -> tuple[Contest, ...]:
    """All of them; in small sizes to see that everything runs."""
    if quick:
        llama = Workload("llama", 64, 128, 2, 4, 200, 2, 16)
        bert = Workload("bert", 64, 128, 2, 4, 200, 2, 16)
        vit = Workload("vit", 64, 128, 2, 4, 10, 2, 32)
        mlp = Workload("mlp", 64, 64, 3, vocabulary=10, batch=4)
        long, several = replace(llama, length=32), replace(bert, batch=4)
    else:
        llama = Workload("llama", 512, 1376, 8, 8, 32000, 1, 256, label="Llama 8x512, vocabulary 32,000")
        bert = Workload("bert", 768, 3072, 12, 12, 30522, 1, 128, label="BERT-base classifier")
        vit = Workload("vit", 768, 3072, 12, 12, 1000, 1, 224, label="ViT-B/16 classifier")
        mlp = Workload("mlp", 2048, 2048, 8, vocabulary=1000, batch=32, length=1024)
        long, several = replace(llama, length=2048), replace(bert, batch=8)
    return (
        Contest(llama, _OURS, {**_LXT, **_CAPTUM}),
        Contest(long, _LEAST, {**_LXT, **_GRADIENT}),
        Contest(bert, _OURS, {**_LXT, **_CAPTUM}),
        Contest(several, _OURS, {**_LXT, **_GRADIENT}),
        Contest(vit, _OURS, dict(_CAPTUM)),
        Contest(mlp, ("forward", "fxlrp epsilon", "fxlrp gamma"), dict(_LINEAR)),
    )


class Failed(RuntimeError):
    """A contender could not do what it was asked."""


class Worker:
    """A contender's process."""

    def __init__(self, python: Path, contender: str) -> None:
        self.contender = contender
        self.process = subprocess.Popen(
            [str(python), "-m", "bench.peers.worker"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("FXLRP_PEERS_DEBUG") else None,
            text=True,
        )

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            Failed: the contender failed or ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.contender} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.contender}, {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def started(contest: Contest, contender: str, weights: Path) -> Iterator[tuple[Worker, dict[str, Any]]]:
    """A contender with its model loaded, and the versions that it runs with."""
    worker = Worker(PEERS if contender in contest.peers else Path(sys.executable), contender)
    try:
        given = {"method": contender, "weights": str(weights)}
        found = worker.ask("load", workload=contest.workload.to_data(), **{"with": given})
        yield worker, found
    finally:
        worker.close()


def run(contest: Contest, rounds: int | None, gate: float, *, memory: bool) -> dict[str, Any]:
    """One contest: the gate, interleaved times, peak memory; without ``rounds``, 5 to 15 by the clock."""
    from safetensors.torch import load_file, save_file

    names = (*contest.ours, *contest.peers)
    work = contest.workload
    result: dict[str, Any] = {
        "workload": work.name,
        "subject": work.model,
        "batch": work.batch,
        "length": work.tokens,
        "gate": {},
        "left out": {},
        "versions": {},
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        parameters = dict(model_of(contest.workload).named_parameters())
        weights = Path(folder) / "weights.safetensors"
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, weights)
        workers: dict[str, Worker] = {}
        relevance: dict[str, Tensor] = {}
        for name in names:
            try:
                worker, versions = stack.enter_context(started(contest, name, weights))
                worker.ask("explain", out=str(Path(folder) / "relevance"))
            except Failed as error:
                result["left out"][name] = str(error)
                continue
            relevance[name] = load_file(str(Path(folder) / "relevance"))["relevance"]
            workers[name], result["versions"][name] = worker, versions
        for name, reference in {**contest.peers, **_SAME}.items():
            if reference is not None and name in relevance and reference in relevance:
                found = difference(relevance[name], relevance[reference])
                result["gate"][f"{name} against {reference}"] = found
                if not found <= gate:
                    result["left out"][name] = f"not the relevance of {reference}: {found:.1e}"
                    del workers[name]
        times: dict[str, list[float]] = {name: [] for name in workers}
        warm = sum(worker.ask("time")["seconds"] for worker in workers.values())
        result["rounds"] = rounds or round(min(15, max(5, BUDGET / warm)))
        for i in range(result["rounds"]):
            for name in list(workers) if i % 2 else list(reversed(workers)):
                times[name].append(workers[name].ask("time")["seconds"])
        result["seconds"] = {name: statistics.median(t) for name, t in times.items()}
        for base in (b for b in _BASES if b in times):
            result[f"over {base}"] = {name: ratio(t, times[base]) for name, t in times.items()}
        stack.pop_all().close()
        if memory:
            result["peak MiB"] = {}
            for name in workers:
                with started(contest, name, weights) as (worker, _):
                    result["peak MiB"][name] = worker.ask("peak")["mib"]
    return result


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | contender | s | over forward | over Gradient × Input | over LXT | over LXT, frozen | "
        "peak MiB | gate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, seconds in result["seconds"].items():
            memory = result.get("peak MiB", {}).get(name)
            gate = next((v for k, v in result["gate"].items() if k.startswith(f"{name} against")), None)
            over = [result.get(f"over {base}", {}).get(name) for base in _BASES[:4]]
            ratios = " | ".join("" if x is None else f"{x:.2f}" for x in over)
            lines.append(
                f"| {result['workload']} | {name} | {seconds:.4f} | {ratios} | "
                f"{'' if memory is None else f'{memory:.0f}'} | {'' if gate is None else f'{gate:.1e}'} |"
            )
        lines += [
            f"| {result['workload']} | {name} | left out: {why} | | | | | | |"
            for name, why in result["left out"].items()
        ]
    return "\n".join(lines)


def main() -> None:
    """Run the contests and print their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no memory")
    parser.add_argument("--rounds", type=int, help="5 to 15 by the clock without it")
    parser.add_argument("--only", nargs="*", help="shapes: llama, bert, vit, mlp")
    parser.add_argument("--gate", type=float, default=1e-3, help="the largest difference that passes")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    if not PEERS.is_file():
        sys.exit("The peers are not installed: make peers")
    results, failed, measured = [], [], versions()
    for contest in contests(quick=options.quick):
        if options.only and contest.workload.shape not in options.only:
            continue
        print(f"{contest.workload.name} …", file=sys.stderr, flush=True)
        rounds = 3 if options.quick else options.rounds
        result = run(contest, rounds, options.gate, memory=not options.quick)
        failed += [f"{name}: {why}" for name, why in result["left out"].items()]
        results.append(result)
        if options.out:  # after each contest, so that a run cut short leaves what it measured
            save(options.out, {"versions": measured, "results": results})
    print(table(results))
    print(", ".join(f"{k} {v}" for k, v in measured.items()))
    if failed:
        sys.exit(f"Left out: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

"""One contender in a process of its own: reads commands, answers, one JSON object a line.

    python -m bench.peers.worker

Commands: ``{"do": "load", "workload", "with": {"method", "weights"}}``,
``{"do": "explain", "out"}``, ``{"do": "time"}``, ``{"do": "peak"}``. An answer holds ``error`` where one
failed. Nothing else is written to standard output.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from ..peak import peak_above
from .describe import Workload, model_of
from .methods import METHODS, Run


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with answers
    run: Run | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                run = _load(Workload(**command["workload"]), **command["with"])
                answer = _versions()
            else:
                assert run is not None, "load comes first"
                answer = _answer(command, run)
        except Exception as error:  # the parent says what failed where
            traceback.print_exc(file=sys.stderr)
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
        print(json.dumps(answer), file=answers)


def _load(workload: Workload, method: str, weights: str) -> Run:
    from safetensors.torch import load_file

    _torchvision_without_kernels()
    prepare, before = METHODS[method]
    if before is not None:
        before(workload)
    model = model_of(workload)
    stored = load_file(weights)
    for name, parameter in model.named_parameters():
        parameter.copy_(stored[name if name in stored else _renamed(name)])
    return prepare(model, workload)


#: Parts of names of weights in the peers' version of transformers, and in ours.
_RENAMED = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def _answer(command: dict[str, Any], run: Run) -> dict[str, Any]:
    if command["do"] == "explain":
        from safetensors.torch import save_file

        save_file({"relevance": run().detach().contiguous()}, command["out"])
        return {}
    if command["do"] == "time":
        start = time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - start}
    if command["do"] == "peak":
        return {"mib": peak_above(run)}
    raise ValueError(f"unknown command {command['do']!r}")


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    for name in ("torch", "transformers", "fxlrp", "captum", "lxt", "zennit"):
        if name in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found


def _torchvision_without_kernels() -> None:
    """LXT and zennit import torchvision for its classes of models. Where its kernels were built for another
    torch they do not load, and then it fails to describe two ops, unless something has declared them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


#: Libraries of ops live as long as what declares them.
_KEPT: list[Any] = []

if __name__ == "__main__":
    main()

"""Load: a saved explainer without the model, its code or pickle. Nothing in the file is run as code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..compiler.fused import AUTO, REFERENCE
from ..compiler.graphs import output_node
from ..compiler.lower import lower
from ..errors import ArtifactError, KernelError, first_line
from . import graph as graphs
from . import weights
from .aot import native_runner
from .header import PACKAGE, Header, device_of, header_of
from .loaded import LoadedExplainer, LoadedProgram
from .ops import resolve
from .strict import fields, refuse
from .values import with_values


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: str | torch.device | None = None,
    *,
    verify: bool = True,
    aot: bool = False,
    chunk: int | None = None,
    kernels: str = AUTO,
) -> LoadedExplainer:
    """Load what ``Explainer.save`` wrote.

    The model's code is not needed, and nothing in the file is run as code: its graph is built node by node of
    a fixed list of ops. On a CPU, weights are mapped from the file, which must stay as it is.

    Args:
        path: of the file.
        backend: see :func:`fxlrp.lrp_compile`.
        device: where the weights go; None for where the explainer was. The kernels that a graph calls can be
            a device's own: what was saved on a CPU may not run on a GPU.
        verify: compare the weights with their checksums, which reads all of them.
        aot: run the native code that ``save(aot=True)`` put in. This is code from the file: only for files
            that you would run.
        chunk: how many of several targets are explained in one pass at most.
        kernels: ``"auto"``, or ``"reference"`` to leave linear maps to PyTorch. Kernels of rules are those
            that were chosen when it was saved; where they cannot run, their ops compute the reference.

    Raises:
        ArtifactError: it is no artifact, of another format, damaged, or needs ops that are not there.
        KernelError: other ``kernels``.
        ImportError: the package safetensors is missing.
    """
    stored = weights.read(Path(path))
    header = header_of(stored)
    if verify:
        weights.refuse_changed(stored, header.digests)
    saved, place = device_of(header.inputs.device), torch.device(device or header.inputs.device)
    lower(None, backend, place)  # refuses an unknown backend
    if kernels not in (AUTO, REFERENCE):
        raise KernelError(
            f"kernels={kernels!r}: of an artifact they are chosen already. Give 'auto' or 'reference'."
        )
    try:
        torch.empty(0, device=place)
    except Exception as error:  # another class for each kind of device
        raise ArtifactError(
            f"The artifact is for {place}, which is not here: {first_line(error)}. Give device=…."
        ) from error
    if place.type != saved.type:
        _refuse_bound_ops(header, place)
    pieces = {v.piece: stored.aligned(v.piece).to(place) for v in header.constants}
    constants = tuple(v.of(pieces[v.piece], f"constants[{i}]") for i, v in enumerate(header.constants))

    def moved(name: str) -> torch.device:
        found = device_of(name)
        return place if found == saved else found

    if aot and PACKAGE not in stored.names:
        raise ArtifactError("The artifact holds no native code: save(path, aot=True) puts it in.")
    programs = []
    for i, program in enumerate(header.programs):
        count = len(header.inputs.names) + program.operands
        module = graphs.from_data(program.data, f"programs[{i}].graph", count, constants, moved)
        if not program.results.fits(output_node(module.graph).args[0]):
            refuse(f"programs[{i}].graph.output", "does not have the parts that results names")
        if place.type != "cpu" or backend not in ("auto", "eager"):
            module = with_values(module, header, program.target, place)
        native = aot and i == 0  # the package is the first program's
        runner = (
            native_runner(stored.tensor(PACKAGE), module)
            if native
            else lower(module, backend, place, onednn=kernels != REFERENCE)
        )
        programs.append(LoadedProgram(program, module, runner))
    return LoadedExplainer(header, tuple(programs), place, chunk)


def _refuse_bound_ops(header: Header, place: torch.device) -> None:
    """Refuse a graph with ops that have no kernel on a device.

    Raises:
        ArtifactError: with the first of them.
    """
    key = {"cuda": "CUDA", "cpu": "CPU"}.get(place.type, place.type.upper())
    has: Callable[[str, str], bool] = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    for i, program in enumerate(header.programs):
        (nodes, _) = fields(program.data, f"programs[{i}].graph", nodes=list, output=dict)
        for node in nodes:
            op = node.get("op") if type(node) is dict else None
            if type(op) is str and isinstance(target := resolve(op), torch._ops.OpOverload):
                try:
                    runs = has(target.name(), key)
                except RuntimeError:
                    runs = False
                if not runs:
                    raise ArtifactError(
                        f"The artifact was saved on {header.inputs.device} and calls {op}, which has no "
                        f"kernel for {place.type}: PyTorch chose it for that device. Explain and save on "
                        f"{place.type}."
                    )

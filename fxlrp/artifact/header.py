"""What an artifact says without its tensors, and how that is read and checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compiler.plan import layout
from ..errors import ArtifactError
from . import weights
from .expressions import text
from .spec import Inputs, Kind, Logits, Results
from .strict import check, fields, items, parse, refuse

#: The version of the format; another one is refused.
FORMAT = 1
#: Keys of the file's metadata.
MANIFEST, PROGRAM = "fxlrp.manifest", "fxlrp.program"
#: The name of native code among the tensors.
PACKAGE = "fxlrp.aot"


@dataclass(frozen=True)
class SavedRow:
    """One row of a saved plan: which node had which rule, and why."""

    node: str
    op: str
    kind: str
    rule_name: str
    rule: str
    reason: str
    module: str
    source: str


@dataclass(frozen=True)
class SavedPlan:
    """A saved plan; prints as a table."""

    rows: tuple[SavedRow, ...]
    notes: tuple[str, ...]

    def table(self, *, structural: bool = False) -> str:
        """The plan as text; structural nodes, whose relevance moves with its elements, on request."""
        rows = [
            (r.kind, r.rule_name, (r.node, r.op, r.rule, r.reason, r.module, r.source)) for r in self.rows
        ]
        return layout(rows, self.notes, structural=structural)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True, eq=False)
class SavedProgram:
    """A program of an artifact.

    Attributes:
        target: the kind of its targets.
        operands: how many tensors it takes besides the inputs: positions and indices of targets.
        results: what it returns.
        plan: which node has which rule.
        data: its graph as plain data, not checked yet.
    """

    target: Kind
    operands: int
    results: Results
    plan: SavedPlan
    data: Any


@dataclass(frozen=True, eq=False)
class Header:
    """What an artifact says without its tensors.

    Attributes:
        fxlrp: the version that wrote it.
        torch: PyTorch's at that time.
        inputs: what its programs take.
        logits: where targets are read; None for a function of the output.
        composite: the title of its rules.
        composite_json: the rules as JSON; None where some are no plain data.
        constants: views of the tensors.
        programs: by kind of target, the last call's first.
        digests: SHA-256 of each tensor.
    """

    fxlrp: str
    torch: str
    inputs: Inputs
    logits: Logits | None
    composite: str
    composite_json: str | None
    constants: tuple[weights.View, ...]
    programs: tuple[SavedProgram, ...]
    digests: Mapping[str, str]

    def __str__(self) -> str:
        inputs = self.inputs
        lines = [
            f"{inputs.model}, explained by {self.composite}",
            f"saved by fxlrp {self.fxlrp} with PyTorch {self.torch} on {inputs.device}; "
            f"{len(self.digests)} tensors" + (", native code" if PACKAGE in self.digests else ""),
            "inputs:",
        ]
        for name, dtype, shape in zip(inputs.names, inputs.dtypes, inputs.sizes.shapes, strict=True):
            lines.append(f"  {name}: {dtype} [{', '.join(map(text, shape))}]")
        lines += [f"  {name} = {value!r}" for name, value in inputs.constants.items()]
        lines += [f"  where {text(condition)}" for condition in inputs.sizes.conditions]
        for program in self.programs:
            results = program.results
            lines.append(
                f"target {program.target}: relevance of {', '.join(results.names + results.positions)}"
            )
            if results.latents:
                lines.append(f"  latents: {', '.join(results.latents)}")
            if results.parameters:
                lines.append(f"  parameters: {', '.join(results.parameters)}")
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Header:
    """What an artifact holds; its tensors are not read.

    Raises:
        ArtifactError: it is none, or it is damaged.
    """
    return header_of(weights.read(Path(path)))


def header_of(stored: weights.Stored) -> Header:
    """What the metadata of a safetensors file say, checked.

    Raises:
        ArtifactError: it is no artifact, of another format, or damaged.
    """
    metadata = stored.metadata
    if MANIFEST not in metadata or PROGRAM not in metadata:
        raise ArtifactError(
            f"{stored.path} is a safetensors file but no artifact: explainer.save(…) writes one."
        )
    if metadata.keys() != {MANIFEST, PROGRAM}:
        refuse("metadata", f"has the keys {sorted(metadata)}")
    manifest = check(parse(metadata[MANIFEST], "manifest"), dict, "manifest")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{stored.path} has format {str(manifest.get('format'))[:20]} (written by fxlrp "
            f"{str(manifest.get('fxlrp'))[:20]}); this fxlrp reads format {FORMAT}. Save it again."
        )
    _, version, pytorch, program_digest, digests = fields(
        manifest, "manifest", format=int, fxlrp=str, torch=str, program=str, tensors=dict
    )
    written = metadata[PROGRAM]
    if hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest() != program_digest:
        raise ArtifactError(
            f"The program of {stored.path} is not what was saved: the file was changed or damaged. Copy it "
            "anew, or save it again."
        )
    if digests.keys() != set(stored.names):
        refuse("manifest.tensors", f"does not name the file's tensors ({len(stored.names)})")
    data = parse(written, "program")
    given, logits, composite, constants, programs = fields(
        data,
        "program",
        inputs=dict,
        logits=(dict, type(None)),
        composite=dict,
        constants=list,
        programs=list,
    )
    inputs = Inputs.from_data(given)
    device_of(inputs.device)
    title, rules = fields(composite, "composite", title=str, json=(str, type(None)))
    views = tuple(weights.View.from_data(v, f"constants[{i}]") for i, v in enumerate(constants))
    for view in views:
        if view.piece not in digests:
            refuse("constants", f"names the tensor {view.piece[:80]!r}, which is not there")
    if not digests.keys() <= {PACKAGE, *(view.piece for view in views)}:
        refuse("manifest.tensors", "names tensors that no program uses")
    found = tuple(_program(p, f"programs[{i}]") for i, p in enumerate(programs))
    if not found:
        refuse("programs", "is empty")
    return Header(
        version,
        pytorch,
        inputs,
        None if logits is None else Logits.from_data(logits, inputs),
        title,
        rules,
        views,
        found,
        digests,
    )


def _program(data: Any, where: str) -> SavedProgram:
    target, operands, results, graph, plan = fields(
        data, where, target=dict, operands=int, results=dict, graph=dict, plan=dict
    )
    if not 0 <= operands < 100:
        refuse(f"{where}.operands", f"is {operands}")
    rows, notes = fields(plan, f"{where}.plan", rows=list, notes=list)
    listed = [items(row, str, f"{where}.plan.rows") for row in rows]
    if any(len(row) != 8 for row in listed):
        refuse(f"{where}.plan.rows", "has a row that is not of eight texts")
    saved = SavedPlan(
        tuple(SavedRow(*row) for row in listed), tuple(items(notes, str, f"{where}.plan.notes"))
    )
    kind = Kind.from_data(target, f"{where}.target")
    return SavedProgram(kind, operands, Results.from_data(results, f"{where}.results"), saved, graph)


def device_of(name: str) -> torch.device:
    """A device by its name.

    Raises:
        ArtifactError: there is none of this name.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        refuse("device", f"{name[:40]!r} is none")

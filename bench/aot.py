"""Kernels compiled ahead of time for GPUs that need not be there: registers, shared memory, spills.

    python -m bench.aot [--jobs N] [--only softmax] [--targets sm_90] [--sample] [--write]

Compiles every variant of every kernel (``variants()`` of each folder's ``kernel.py``) with Triton's own
compilers, which need no device. Pointers and integers count as divisible by 16, as they are for the
tensors and strides of real models; launches with others compile other code.
Exit status 1 where a default variant does not compile, spills or outgrows shared memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fxlrp.kernels
from fxlrp.kernels.launch import Variant


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: as its maker calls it.
        backend: Triton's backend, its architecture, and threads of a warp: ``GPUTarget``'s arguments.
        shared_limit: bytes of shared memory that one block may use.
        example: a GPU of that kind.
    """

    name: str
    backend: tuple[str, int | str, int]
    shared_limit: int
    example: str


TARGETS = (
    Target("sm_80", ("cuda", 80, 32), 163 * 1024, "A100"),
    Target("sm_90", ("cuda", 90, 32), 227 * 1024, "H100, H200"),
    Target("sm_100", ("cuda", 100, 32), 227 * 1024, "B200"),
    Target("gfx942", ("hip", "gfx942", 64), 64 * 1024, "MI300"),
)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one variant for one target.

    Attributes:
        kernel: the folder.
        label: the variant's.
        dtype: of its first pointer.
        target: the target's name.
        is_default: whether launches choose it.
        registers: vector registers a thread.
        shared: bytes of shared memory a block.
        spilled: bytes of registers spilled to memory a thread; local arrays count too.
        seconds: what compiling took.
        error: the compiler's message, if it failed.
    """

    kernel: str
    label: str
    dtype: str
    target: str
    is_default: bool
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    seconds: float = 0.0
    error: str = ""

    def fault(self) -> str:
        """Why this must not be launched by default, or, of an alternative, not even measured; empty where it
        may.
        """
        if self.error:
            return f"does not compile: {self.error}"
        limit = next(t.shared_limit for t in TARGETS if t.name == self.target)
        faults = [
            f"spills {self.spilled} bytes a thread" if self.spilled else "",
            f"wants {self.shared} bytes of shared memory of {limit}" if self.shared > limit else "",
        ]
        return "; ".join(filter(None, faults)) if self.is_default else ""


def kernels() -> list[str]:
    """The folders of :mod:`fxlrp.kernels` that hold Triton code."""
    folders = [m.name for m in pkgutil.iter_modules(fxlrp.kernels.__path__) if m.ispkg]
    return [name for name in folders if importlib.util.find_spec(f"fxlrp.kernels.{name}.kernel")]


def variants(only: Iterable[str] = ()) -> Iterator[tuple[str, Variant]]:
    """Every variant with its folder, or those of some folders."""
    for name in kernels():
        if not only or name in only:
            module = importlib.import_module(f"fxlrp.kernels.{name}.kernel")
            yield from ((name, variant) for variant in module.variants())


#: A folder, its variant, and what to compile it for.
Job = tuple[str, Variant, Target]


def jobs(only: Iterable[str] = ()) -> list[Job]:
    """Every variant for each target that it is for; of some folders only, where named."""
    return [(f, v, t) for f, v in variants(only) for t in TARGETS if t.name in v.targets]


def sample(work: Iterable[Job]) -> list[Job]:
    """The largest default variant of each function, dtype and target: what takes most memory."""
    largest: dict[tuple[str, str, str, str], Job] = {}
    for job in work:
        folder, variant, target = job
        key = folder, variant.kernel.fn.__name__, dtype_of(variant), target.name
        if variant.is_default and (key not in largest or _size(variant) >= _size(largest[key][1])):
            largest[key] = job
    return list(largest.values())


def _size(variant: Variant) -> int:
    numbers = [c for c in variant.constants.values() if type(c) is int and c > 0]
    return math.prod(numbers)


def dtype_of(variant: Variant) -> str:
    """The element type of a variant's first pointer, such as ``bf16``."""
    return next((kind[1:] for kind in variant.signature.values() if kind.startswith("*")), "")


def compile_variant(folder: str, variant: Variant, target: Target) -> Compiled:
    """Compile one variant for one target and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    about = (folder, variant.label, dtype_of(variant), target.name, variant.is_default)
    start = time.perf_counter()
    try:
        names = variant.kernel.arg_names
        kinds = {n: "constexpr" if n in variant.constants else variant.signature[n] for n in names}
        aligned = [i for i, n in enumerate(names) if kinds[n].startswith("*") or kinds[n] in ("i32", "i64")]
        source = ASTSource(
            variant.kernel,
            signature=kinds,
            constexprs=dict(variant.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
        made = triton.compile(source, target=GPUTarget(*target.backend), options=options)
        registers, spilled = _used(made.asm)
    except Exception as error:  # whatever the compiler raises is a finding about this variant
        message = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return Compiled(*about, error=message[:200], seconds=time.perf_counter() - start)
    seconds = round(time.perf_counter() - start, 2)
    return Compiled(*about, registers, made.metadata.shared, spilled, seconds)


def _used(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, from machine code."""
    if "amdgcn" in asm:
        counts = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)"
        found = dict(re.findall(counts, asm["amdgcn"]))
        scratch = max(int(found["private_segment_fixed_size"]), 4 * int(found["vgpr_spill_count"]))
        return int(found["vgpr_count"]), scratch
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run(
            [program, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


_inherited: list[Job] = []  # in a worker: its parent's, since Triton's functions cannot be pickled


def _inherit(work: list[Job]) -> None:
    _inherited[:] = work


def _compile(index: int) -> Compiled:
    return compile_variant(*_inherited[index])


def compile_all(work: Sequence[Job], processes: int = 1) -> Iterator[Compiled]:
    """Each job, in order; in several processes where asked for."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile: unset it before Triton is imported")
    if processes == 1:
        yield from (compile_variant(*job) for job in work)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), initializer=_inherit, initargs=(list(work),)
    )
    with pool:
        yield from pool.map(_compile, range(len(work)))


def main() -> None:
    """Compile, print the table and what is at fault; with ``--write``, keep both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--only", nargs="*", default=(), choices=kernels(), help="kernels")
    parser.add_argument("--targets", nargs="*", default=(), choices=[t.name for t in TARGETS], help="GPUs")
    parser.add_argument("--sample", action="store_true", help="the largest variant of each function only")
    parser.add_argument("--lines", action="store_true", help="print each result as a line of JSON")
    parser.add_argument("--write", action="store_true", help="write docs/kernels-compiled.md and its JSON")
    options = parser.parse_args()
    from . import aot_table  # which is written in terms of this module

    known = jobs(options.only)
    work = sample(known) if options.sample else known
    work = [job for job in work if not options.targets or job[2].name in options.targets]
    start, found = time.perf_counter(), []
    for one in compile_all(work, options.jobs):
        found.append(one)
        if options.lines:
            print(json.dumps(asdict(one) | {"fault": one.fault()}), flush=True)
        elif len(found) % 20 == 0:
            spent = time.perf_counter() - start
            print(f"[{len(found)}/{len(work)}] {spent:.0f} s", file=sys.stderr, flush=True)
    if options.write:
        aot_table.write(known, found)
    if not options.lines:
        print(aot_table.summarise(found))
    faults = [f"{c.kernel}: {c.label} for {c.target}: {c.fault()}" for c in found if c.fault()]
    print(*faults, f"{len(found)} compiled, {len(faults)} at fault", sep="\n", file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

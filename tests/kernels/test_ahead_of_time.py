"""Every kernel compiles for GPUs that are not there, within their registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from bench import aot, aot_table

REPOSITORY = Path(__file__).parents[2]


def _python(*args):
    """Python in a process where Triton compiles and does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "kernels")])
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("folder", aot.kernels())
def test_the_largest_of_what_launches_choose_compiles_without_spills(folder):
    """Would break if a default configuration spilled, outgrew shared memory or did not compile somewhere.

    The largest of each function, dtype and target; `python -m bench.aot` compiles them all, in minutes.
    """
    result = _python("-m", "bench.aot", "--sample", "--lines", "--jobs", "1", "--only", folder)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    expected = aot.sample(aot.jobs([folder]))
    assert len(found) == len(expected) > 0, result.stderr[-2000:]
    assert {f["target"] for f in found} == {t.name for t in aot.TARGETS}
    faults = [f"{f['label']} for {f['target']}: {f['fault']}" for f in found if f["fault"]]
    assert not faults
    assert result.returncode == 0


_SAMPLES = """
import json, samples
from bench import aot
targets = {target.name: target for target in aot.TARGETS}
for variant, names, expected in samples.CASES:
    for name in names:
        found = aot.compile_variant("samples", variant, targets[name])
        print("found", json.dumps([found.label, name, expected, found.fault()]))
"""


def test_faults_of_sample_kernels_are_found():
    """Would break if a spill, too much shared memory or a mistake went unnoticed, or a sound kernel not."""
    result = _python("-c", _SAMPLES)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line[6:]) for line in result.stdout.splitlines() if line.startswith("found ")]
    assert len(found) == 13
    for label, target, expected, fault in found:
        assert expected in fault and bool(fault) == bool(expected), (label, target, fault)


@pytest.mark.parametrize("target", aot.TARGETS, ids=lambda target: target.name)
def test_each_target_has_its_own_limit_of_shared_memory(target):
    """Would break if a kernel passed whose block is larger than the target lets a block be."""
    about = ("kernel", "label", "fp32", target.name, True, 64)
    assert aot.Compiled(*about, shared=target.shared_limit).fault() == ""
    assert "shared memory" in aot.Compiled(*about, shared=target.shared_limit + 1).fault()


def test_the_tool_refuses_to_compile_what_is_interpreted():
    """Would break if interpreted kernels were handed to the compiler, or counted as compiled."""
    result = _python(
        "-c",
        "import os; os.environ['TRITON_INTERPRET'] = '1'; from bench import aot; next(aot.compile_all([]))",
    )
    assert "unset it" in result.stderr


def test_labels_of_variants_differ():
    """Would break if two variants shared a line of the table, and so one of them was not in it."""
    labels = [(folder, variant.label) for folder, variant in aot.variants()]
    assert len(labels) == len(set(labels))


def test_the_committed_table_lists_the_variants_of_the_code():
    """Would break if a configuration was added or renamed and `python -m bench.aot --write` not run."""
    kept = json.loads(aot_table.RESULTS.read_text(encoding="utf-8"))
    defined = aot_table.stored(aot.jobs(), ())
    assert {folder: list(labels) for folder, labels in kept.items()} == {
        folder: list(labels) for folder, labels in defined.items()
    }
    for folder, labels in defined.items():
        for label, entry in labels.items():
            assert kept[folder][label] == entry | {
                target: kept[folder][label][target] for target in entry if target not in ("dtype", "default")
            }


def test_the_committed_table_has_the_largest_variants_and_no_fault():
    """Would break if what was committed spills somewhere, or was compiled without the largest."""
    kept = json.loads(aot_table.RESULTS.read_text(encoding="utf-8"))
    found = aot_table.restored(kept)
    compiled = {(c.kernel, c.label, c.target) for c in found}
    assert {(f, v.label, t.name) for f, v, t in aot.sample(aot.jobs())} <= compiled
    assert [(c.label, c.target, c.fault()) for c in found if c.fault()] == []
    assert aot_table.summarise(found) in aot_table.TABLE.read_text(encoding="utf-8")

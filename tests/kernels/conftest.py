"""Kernels under test: interpreted where there is no CUDA device, on poisoned memory, inside canaries.

Triton decides when it is imported, and again when a kernel is decorated, whether kernels are interpreted.
So the switch is on while this folder's modules are imported and its tests run, and off for all others.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from common import guarded_allocations

SWITCH = "TRITON_INTERPRET"
HAS_CUDA = torch.cuda.is_available()
#: A value that the user gave stays, for every test.
INTERPRETS = not HAS_CUDA and SWITCH not in os.environ


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    if not INTERPRETS:
        yield
        return
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        del os.environ[SWITCH]


with _interpreting():
    if INTERPRETS and "triton" in sys.modules:
        raise pytest.UsageError(f"Triton was imported before tests/kernels: set {SWITCH}=1 or name it first")
    with contextlib.suppress(ModuleNotFoundError):
        import triton  # noqa: F401  # its own library of jit functions must be interpreted too


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    with _interpreting():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with _interpreting():
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Mark what the interpreter runs; the closing summary counts it."""
    call = getattr(item, "callspec", None)
    if call is not None and call.params.get("device") == "cpu":
        item.user_properties.append(("kernels", "interpreted"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernel under test runs: in the interpreter, or on the device where there is one."""
    if request.param == "cpu":
        pytest.importorskip("triton")
        if os.environ.get(SWITCH) != "1":
            pytest.skip("kernels run on the CUDA device here; TRITON_INTERPRET=1 interprets them")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What torch.empty and its like allocate is full of NaN and lies between canaries, checked at the end."""
    with guarded_allocations():
        yield

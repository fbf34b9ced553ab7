"""Settings that every test shares: offline, seeded, and with one place where the data lies."""

import os
import random
from pathlib import Path

# Before anything imports a hub client: they read these at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


class _TorchRandom:
    """torch's generator as hypothesis wants one, so that an example that failed fails again."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_torch_random = _TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(_torch_random)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of evaluation data: $FXLRP_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("FXLRP_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no evaluation data: set FXLRP_DATA to its folder")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran a kernel in Triton's interpreter."""
    passed = [r for r in terminalreporter.stats.get("passed", []) if "tests/kernels/" in r.nodeid]
    interpreted = sum(("kernels", "interpreted") in map(tuple, r.user_properties) for r in passed)
    if passed:
        text = f"kernels: {interpreted} of {len(passed)} tests that passed ran one in Triton's interpreter"
        terminalreporter.write_line(text)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

"""What every launch hands over: no tensor that it writes by two arguments, whole or in part.

PyTorch makes a launch functional by a copy of each argument that is written, and keeps one of several copies
of the same memory: what the others were to hold is lost where Inductor compiles the op.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles.models import GatedBlock
from torch import Tensor

pytest.importorskip("triton")
import fxlrp
from fxlrp.compiler.fused import KERNELS
from fxlrp.kernels.matmul import Tiles
from fxlrp.rules import Epsilon, Gamma

TILES = Tiles(16, 16, 16, 4, 1)


@pytest.fixture
def launches() -> Iterator[Counter[str]]:
    """Launches by name of the kernel, each checked as it is made."""
    from fxlrp.kernels.launch import launch

    for folder in ("attention", "gate", "linear_epsilon", "linear_split", "matmul", "norm", "softmax"):
        importlib.import_module(f"fxlrp.kernels.{folder}.kernel")
    counts: Counter[str] = Counter()

    def checked(kernel: Any) -> Any:
        class Grid:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def run(*args: Any, **kwargs: Any) -> None:
                    counts[getattr(kernel, "__name__", str(kernel))] += 1
                    one_argument_for_each(launch(kernel)[grid], args, kwargs)

                return run

        return Grid()

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("fxlrp.kernels.") and getattr(module, "launch", None) is launch:
                patch.setattr(module, "launch", checked)
        yield counts


def one_argument_for_each(run: Callable[..., None], args: Any, kwargs: Any) -> None:
    """Run a launch; what it wrote was in one of its arguments alone."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    memory = Counter(t.untyped_storage().data_ptr() for t in tensors)
    before = [(t, t.untyped_storage().data_ptr(), bits(t).clone()) for t in tensors]
    run(*args, **kwargs)
    for tensor, pointer, old in before:
        if not torch.equal(bits(tensor), old):
            assert memory[pointer] == 1, f"written by two arguments: {tuple(tensor.shape)}"


def bits(tensor: Tensor) -> Tensor:
    """What a tensor's memory holds, NaN and all."""
    return tensor.detach().contiguous().view(torch.uint8)


def test_explanations_write_nothing_twice(device: torch.device, launches: Counter[str]) -> None:
    """Every kernel, as it is launched in explanations by two composites."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    model, x = GatedBlock().eval().to(device), torch.randn(2, 7, 16, device=device)
    for rule in (Epsilon(0.1), Gamma(0.25)):
        composite = fxlrp.Composite([(fxlrp.op("linear"), rule)])
        fxlrp.lrp_compile(model, composite, backend="eager", kernels=KERNELS)(x)
    matmul.fp32_precision = before
    assert len(launches) >= 9, launches


def test_parts_of_a_reduction_write_nothing_twice(device: torch.device, launches: Counter[str]) -> None:
    """Reductions that are split have sums of their own, of one result or of two."""
    from fxlrp.kernels.linear_epsilon import kernel as epsilon
    from fxlrp.kernels.linear_split import kernel as split

    x, weight = torch.randn(5, 64, device=device), torch.randn(9, 64, device=device)
    z, absolute = split.forward(x, weight, None, False, (TILES, 4))
    torch.testing.assert_close(absolute, x.abs() @ weight.abs().T)
    g = torch.randn_like(z)
    wide = torch.cat([weight] * 8)
    deep_g, deep_z, deep_a = (torch.cat([t] * 8, -1) for t in (g, z, absolute))
    split.relevance(deep_g, deep_z, deep_a, x, wide, "gamma", [0.25], 0.1, False, False, (TILES, 4))
    epsilon.relevance(deep_g, deep_z, wide, 0.1, None, None, False, (TILES, 4))
    assert launches["sum_both"] == 1 and launches["sum_parts"] == 2

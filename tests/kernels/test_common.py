"""The tests' own tools find what they are there to find."""

import os

import pytest
import torch
from common import (
    DTYPES,
    EDGES,
    assert_accurate,
    checked,
    guarded,
    guarded_allocations,
    poisoned,
    strided,
    ulp,
    values,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _double(x, y, n, block: tl.constexpr, bound: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n + bound
    tl.store(y + at, 2 * tl.load(x + at, mask=inside).to(tl.float32), mask=inside)


def _run(x, bound=0):
    y = torch.empty_like(x)
    _double[(triton.cdiv(x.numel(), 16),)](x, y, x.numel(), block=16, bound=bound)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_kernel_passes(device, dtype):
    """Would break if the guards or the bound found fault with a kernel that has none."""
    x = values((5, 7), dtype, device, "mixed")
    with checked(x) as (inside,):
        y = _run(inside)
    assert_accurate(y, 2 * x, 2 * x.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_out_of_bounds_is_found(device, dtype):
    """Would break if a kernel could write past its output unnoticed."""
    with pytest.raises(AssertionError, match="written outside"), guarded_allocations():
        _run(values((5, 7), dtype, device), bound=1)


def test_a_read_out_of_bounds_is_found(device):
    """Would break if what lies beside an input were a number that a sum could swallow."""
    x = guarded(values((5,), device=device))
    assert x.buffer[x.tensor.storage_offset() + 5].isnan()
    assert x.buffer[x.tensor.storage_offset() - 1].isnan()


def test_an_element_left_unwritten_is_found(device):
    """Would break if fresh memory could hold plausible values."""
    assert torch.empty(3, device=device).isnan().all()
    assert torch.empty_like(values((3,), torch.bfloat16, device)).isnan().all()
    assert values((2,), device=device).new_empty(3, dtype=torch.float16).isnan().all()
    assert (torch.empty(3, dtype=torch.int64, device=device) > 10**6).all()


def test_gaps_of_a_strided_tensor_are_canaries():
    """Would break if a kernel that took a strided output for a contiguous one went unnoticed."""
    guard = poisoned((2, 3), (8, 2), torch.float32)
    guard.tensor.fill_(1.0)
    guard.check()
    guard.buffer[guard.tensor.storage_offset() + 1] = 1.0
    with pytest.raises(AssertionError, match="written outside"):
        guard.check()


def test_a_written_input_is_found():
    """Would break if an op could change its input unnoticed."""
    with pytest.raises(AssertionError, match="was written"), checked(torch.ones(3)) as (inside,):
        inside[1] = 2.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_the_error_of_the_reference_and_no_more(dtype):
    """Would break if the bound let through a kernel less accurate than it says."""
    exact = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    reference = (exact * (1 + 8 * torch.finfo(dtype).eps)).to(dtype)
    assert_accurate((exact * (1 + 16 * torch.finfo(dtype).eps)).to(dtype), reference, exact)
    with pytest.raises(AssertionError, match="largest error"):
        assert_accurate((exact * (1 + 19 * torch.finfo(dtype).eps)).to(dtype), reference, exact)
    with pytest.raises(AssertionError, match="largest error"):
        assert_accurate((exact * (1 + 3 * torch.finfo(dtype).eps)).to(dtype), exact.to(dtype), exact)


def test_one_element_in_many_is_seen_in_the_mean_and_in_the_largest():
    """Would break if one reference element far off excused all others being off."""
    exact = torch.ones(1000, dtype=torch.float64)
    reference, found = exact.float(), exact.float() * 1.001
    reference[0] = 1.01
    with pytest.raises(AssertionError, match="mean error"):
        assert_accurate(found, reference, exact)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_found(wrong):
    """Would break if NaN or an infinity slipped through a comparison that is false for both."""
    exact = torch.ones(4, dtype=torch.float64)
    found = exact.float()
    found[2] = wrong
    with pytest.raises(AssertionError, match="not finite"):
        assert_accurate(found, exact.float(), exact)
    exact[2] = -wrong if wrong == wrong else torch.inf
    with pytest.raises(AssertionError, match="not as the reference"):
        assert_accurate(found, exact.float(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    """Would break if the floor were more, or less, than one rounding."""
    for value in (1.0, 1.75, 3.0, 1e-3, torch.finfo(dtype).tiny):
        bits = torch.tensor([value], dtype=dtype).view(torch.int32 if dtype.itemsize == 4 else torch.int16)
        following = (bits + 1).view(dtype).double()
        assert ulp(bits.view(dtype), dtype) == following - bits.view(dtype).double()


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_values_are_finite(edge, dtype):
    """Would break if an edge were out of a dtype's range, and so tested nothing but overflow."""
    assert values((50, 3), dtype, edge=edge).isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "rows apart", "expanded"])
def test_layouts_hold_the_same_values(layout):
    """Would break if a layout tested other values than it says, or was contiguous after all."""
    x = torch.randn(1, 4, 6).expand(3, 4, 6).contiguous()
    y = strided(x, layout)
    assert torch.equal(x, y)
    assert y.is_contiguous() == (layout == "contiguous")


def test_the_interpreter_is_on_for_kernels_alone(device):
    """Would break if tests of this folder ran no kernel, or compiled one for a device that is not there."""
    assert (os.environ.get("TRITON_INTERPRET") == "1") == (device.type == "cpu")

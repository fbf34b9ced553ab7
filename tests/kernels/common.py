"""What tests of kernels share: an error bound on principle, values at the edges, memory that tells of misuse.

The bound is flash-attention's: a kernel may be off the float64 result by twice what plain PyTorch of the
same precision is off, and not more. Memory holds NaN wherever a kernel must not read, so a read that strays
shows in the result, and a pattern of bits that no kernel computes, so a write that strays shows afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: A NaN with a payload of its own for each width of floats, and a large number for each width of integers:
#: as an index it lies far outside any tensor of a test, and far inside what an address can hold.
_CANARIES = {
    torch.float64: (torch.int64, 0x7FF8_0000_0BAD_F00D),
    torch.float32: (torch.int32, 0x7FC0_BAD5),
    torch.bfloat16: (torch.int16, 0x7FD5),
    torch.float16: (torch.int16, 0x7ED5),
    torch.int64: (torch.int64, 0x0000_0BAD_F00D),
    torch.int32: (torch.int32, 0x0BAD_F00D),
    torch.int16: (torch.int16, 0x7BAD),
    torch.uint8: (torch.uint8, 0xAD),
    torch.int8: (torch.int8, 0x6D),
}
_PAD_BYTES = 1024  # each side; also keeps the alignment that Triton specialises on


@dataclass(frozen=True)
class Guarded:
    """A tensor's elements inside a larger buffer whose other elements are canaries."""

    tensor: Tensor
    buffer: Tensor

    def check(self) -> None:
        """AssertionError where an element outside the tensor was written."""
        if self.tensor.untyped_storage().data_ptr() != self.buffer.untyped_storage().data_ptr():
            return  # given other memory since, as the interpreter does with tensors that it makes empty
        kind, canary = _CANARIES[self.buffer.dtype]
        bits = self.buffer.view(kind).clone()
        bits.as_strided(self.tensor.size(), self.tensor.stride(), self.tensor.storage_offset()).fill_(canary)
        changed = (bits != canary).nonzero().flatten().tolist()
        first = self.tensor.storage_offset()
        where = [i - first for i in changed[:8]]
        assert not changed, f"written outside a tensor of shape {tuple(self.tensor.shape)}: elements {where}"


def _extent(size: Sequence[int], stride: Sequence[int]) -> int:
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def poisoned(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: Any = "cpu") -> Guarded:
    """An uninitialised tensor: NaN (integers: a large number) in it, around it and in its strides' gaps."""
    kind, canary = _CANARIES[dtype]
    pad = _PAD_BYTES // dtype.itemsize
    buffer = torch.full((_extent(size, stride) + 2 * pad,), canary, dtype=kind, device=device).view(dtype)
    # Not a view as autograd knows it: an op's output must not look like one.
    tensor = torch.zeros(0, dtype=dtype, device=device)
    tensor.set_(buffer.untyped_storage(), pad, tuple(size), tuple(stride))
    return Guarded(tensor, buffer)


def guarded(tensor: Tensor) -> Guarded:
    """A copy of a tensor, strides and all, inside canaries."""
    copy = poisoned(tensor.size(), tensor.stride(), tensor.dtype, tensor.device)
    copy.tensor.copy_(tensor)
    return copy


@contextlib.contextmanager
def checked(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Guarded copies of inputs; on leaving, nothing around them has been written, nor they themselves."""
    copies = [guarded(t) for t in tensors]
    yield [c.tensor for c in copies]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.check()
        assert torch.equal(_bits(copy.tensor), _bits(tensor)), (
            f"the input of shape {tuple(tensor.shape)} was written"
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_CANARIES[tensor.dtype][0])


@dataclass
class Allocations:
    """The tensors that were allocated, uninitialised, while a kernel was under test."""

    guards: list[Guarded] = field(default_factory=list)

    def check(self) -> None:
        for guard in self.guards:
            guard.check()

    def replace(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The allocating function with its result poisoned and guarded."""

        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            plain = allocate(*args, **kwargs)
            # Fake and functional tensors and what is being compiled have no memory to poison.
            if type(plain) is not Tensor or plain.dtype not in _CANARIES or plain.device.type == "meta":
                return plain
            guard = poisoned(plain.size(), plain.stride(), plain.dtype, plain.device)
            self.guards.append(guard)
            return guard.tensor.requires_grad_(plain.requires_grad)

        return allocated


_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


@contextlib.contextmanager
def guarded_allocations() -> Iterator[Allocations]:
    """PyTorch's uninitialised allocations are poisoned; on leaving, their canaries are checked."""
    allocations = Allocations()
    with contextlib.ExitStack() as stack:
        for owner, name in _ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, allocations.replace(getattr(owner, name))))
        yield allocations
    allocations.check()


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of a dtype's numbers at each value: ``eps · 2^⌊log₂|v|⌋``, or the smallest subnormal."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.double().abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent - 1)


def assert_accurate(
    found: Tensor, same_precision: Tensor, exact: Tensor, *, name: str = "", terms: Tensor | None = None
) -> None:
    """Error of ``found`` against float64, at most twice that of PyTorch in the same precision.

    With ``e = |found − exact|`` and ``r = |same_precision − exact|``, per element and ``u`` one ulp of the
    dtype at ``exact``: ``max(e − u) ≤ 2 max(r)`` and ``mean(e − u)⁺ ≤ 2 mean(r)``. The ulp is what rounding
    costs where the reference happens to be exact; it counts as no less than float32's smallest normal number,
    since subnormals of its exponent may be flushed to zero (float16's, larger, may not). Infinities and NaN
    must be where float64 has them, except where the same precision overflows: there the kernel may overflow
    likewise, or be right.

    Args:
        found: what the kernel computed, in its dtype.
        same_precision: what the reference computed in that dtype from the same inputs.
        exact: what the oracle computed in float64 from the same inputs, of the same shape.
        name: of the result, for messages.
        terms: magnitudes of what is summed up to it, whose ulp counts where they cancel: with few terms the
            reference may cancel to exactly 0, and it is chance which of two orders does.
    """
    assert exact.dtype == torch.float64, "the oracle is float64"
    assert found.dtype == same_precision.dtype, f"{found.dtype}, the reference has {same_precision.dtype}"
    assert found.shape == same_precision.shape == exact.shape, (
        f"{tuple(found.shape)}, the reference {tuple(same_precision.shape)}, the oracle {tuple(exact.shape)}"
    )
    f, r, x = found.detach().double(), same_precision.detach().double(), exact.detach().double()
    finite = x.isfinite() & r.isfinite()
    same = (f == r) | (f.isnan() & r.isnan()) | (f.isfinite() & x.isfinite())
    odd = ~finite & ~same
    assert not odd.any(), f"{name} not as the reference at {_first(odd)}: {f[odd][:4]}, not {r[odd][:4]}"
    bad = finite & ~f.isfinite()
    assert not bad.any(), f"{name} not finite at {_first(bad)} ({int(bad.sum())} elements)"
    if not finite.any():
        return
    sizes = x if terms is None else torch.maximum(x.abs(), terms)
    f, r, x, sizes = f[finite], r[finite], x[finite], sizes[finite]
    floor = ulp(sizes, found.dtype).clamp(min=torch.finfo(torch.float32).tiny)
    beyond = ((f - x).abs() - floor).clamp(min=0)
    reference = (r - x).abs()
    for what, of in (("largest", torch.max), ("mean", torch.mean)):
        assert of(beyond) <= 2 * of(reference), (
            f"{name} {what} error {of(beyond):.3e} beyond one ulp, the reference's is {of(reference):.3e}; "
            f"values up to {x.abs().max():.3e}"
        )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def double(*tensors: Tensor | None) -> list[Any]:
    """The inputs in float64, for the oracle; integers, booleans and None stay."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def _signs(size: Sequence[int]) -> Tensor:
    return torch.where(torch.rand(*size) < 0.5, -1.0, 1.0)


def _subnormal(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.rand(*size, dtype=torch.float64) * torch.finfo(dtype).tiny * _signs(size)


def _large(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    # Squares and sums of a few thousand of them stay finite in float32, and themselves in float16.
    top = 1e2 if dtype == torch.float16 else 1e15
    return torch.randn(*size, dtype=torch.float64) * top


def _mixed(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    values = torch.randn(*size, dtype=torch.float64)
    kind = torch.randint(0, 5, tuple(size))
    values = torch.where(kind == 1, 0.0, values)
    values = torch.where(kind == 2, _subnormal(size, dtype), values)
    values = torch.where(kind == 3, values * 1e-4, values)
    return torch.where(kind == 4, values * 30, values)


#: Values at the edges of a dtype, by name: each function takes a size and a dtype and gives float64.
EDGES: dict[str, Callable[[Sequence[int], torch.dtype], Tensor]] = {
    "normal": lambda size, dtype: torch.randn(*size, dtype=torch.float64),
    "zeros": lambda size, dtype: torch.zeros(*size, dtype=torch.float64),
    "negative zeros": lambda size, dtype: torch.full(tuple(size), -0.0, dtype=torch.float64),
    "ones": lambda size, dtype: _signs(size).double(),
    "subnormal": _subnormal,
    "large": _large,
    "mixed": _mixed,
}


def values(
    size: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = "cpu", edge: str = "normal"
) -> Tensor:
    """Random values of a kind in :data:`EDGES`, the same on every device."""
    return EDGES[edge](size, dtype).to(dtype).to(device)


def _causal(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def _padded(queries: int, keys: int) -> Tensor:
    return (torch.arange(keys) < max(1, keys - keys // 3)).expand(queries, keys).clone()


def _dead_rows(queries: int, keys: int) -> Tensor:
    mask = torch.rand(queries, keys) < 0.7
    mask[::2] = False
    return mask


#: Which keys a query sees, by name; "dead rows": every second query sees none.
MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "all": lambda queries, keys: torch.ones(queries, keys, dtype=torch.bool),
    "causal": _causal,
    "padded": _padded,
    "random": lambda queries, keys: torch.rand(queries, keys) < 0.7,
    "dead rows": _dead_rows,
    "none": lambda queries, keys: torch.zeros(queries, keys, dtype=torch.bool),
}


def additive(mask: Tensor, dtype: torch.dtype = torch.float32, hidden: float = -torch.inf) -> Tensor:
    """A boolean mask as numbers that are added to scores: 0 where seen, ``hidden`` elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, hidden)


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another layout.

    ``contiguous``; ``transposed``: the last two dimensions change places in memory; ``sliced``: gaps between
    neighbours; ``rows apart``: gaps between rows; ``expanded``: the first element of the first dimension
    at stride 0.
    """
    match layout:
        case "contiguous":
            return tensor.contiguous()
        case "transposed":
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        case "sliced":
            wide = tensor.repeat_interleave(2, dim=-1)
            return wide[..., ::2]
        case "rows apart":
            wide = torch.cat([tensor, tensor], dim=-1)
            return wide[..., : tensor.shape[-1]]
        case "expanded":
            return tensor[:1].expand_as(tensor)
    raise ValueError(f"no layout {layout!r}")

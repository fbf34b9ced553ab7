"""Activations, gates and their relevance against float64 and the rules."""

import math

import pytest

pytest.importorskip("triton")

import torch
from common import DTYPES, EDGES, assert_accurate, checked, strided, values
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlrp.kernels import gate as ops
from fxlrp.kernels.gate import kernel, reference
from fxlrp.kernels.rows import Tile
from fxlrp.rules import Identity, Uniform
from fxlrp.rules.activation import RATIOS
from fxlrp.rules.base import Call

aten = torch.ops.aten
NAMES = sorted(ops.ACTIVATIONS)
TILES = pytest.mark.parametrize("tile", [Tile(4, 64, 4), Tile(2, 32, 4)], ids=str)

#: f(x) of a float, from the definitions.
DEFINITIONS = {
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "hardswish": lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    "softsign": lambda x: x / (1 + abs(x)),
}


def exact_value(x, name):
    flat = [DEFINITIONS[name](v) for v in x.double().flatten().tolist()]
    return torch.tensor(flat, dtype=torch.float64, device=x.device).reshape(x.shape)


def exact_ratio(x, name):
    """f(x)/x, at 0 the slope on the left."""
    x = torch.where(x == 0, -1e-300, x.double())
    return exact_value(x, name) / x


def check_activation(x, g, name, tile=None):
    with checked(x, g) as (x_inside, g_inside):
        found = kernel.run_activation(x_inside, name, tile)
        relevance = kernel.run_activation_relevance(g_inside, x_inside, name, tile)
    assert found.is_contiguous() and relevance.is_contiguous()
    assert_accurate(found, reference.activation(x, name), exact_value(x, name), name="value")
    same = reference.activation_relevance(g, x, name)
    assert_accurate(relevance, same, g.double() * exact_ratio(x, name), name="relevance")


def check_gate(g, a, b, name, share_a=0.5, share_b=0.5, tile=None):
    with checked(g, a, b) as (g_in, a_in, b_in):
        product = kernel.run_gate(a_in, b_in, name, tile)
        frozen = kernel.run_gate(a_in, g_in, name, tile)
        found = kernel.run_gate_relevance(g_in, a_in, b_in, name, share_a, share_b, tile)
    value = exact_value(a, name)
    assert_accurate(product, reference.gate(a, b, name), value * b.double(), name="product")
    assert_accurate(frozen, reference.gate(a, g, name), value * g.double(), name="frozen")
    exact = share_a * g.double() * b.double() * exact_ratio(a, name), share_b * g.double() * value
    same = reference.gate_relevance(g, a, b, name, share_a, share_b)
    for one, like, right in zip(found, same, exact, strict=True):
        assert one.is_contiguous() and one.dtype == g.dtype
        assert_accurate(one, like, right, name="relevance")


def check_packed(g, packed, name, gate_first, share_a=0.5, share_b=0.5, tile=None):
    with checked(g, packed) as (g_in, packed_in):
        found = kernel.run_packed_gate_relevance(g_in, packed_in, name, gate_first, share_a, share_b, tile)
    d = packed.shape[-1] // 2
    a, b = (packed[..., :d], packed[..., d:]) if gate_first else (packed[..., d:], packed[..., :d])
    exact = (
        share_a * g.double() * b.double() * exact_ratio(a, name),
        share_b * g.double() * exact_value(a, name),
    )
    same = reference.packed_gate_relevance(g, packed, name, gate_first, share_a, share_b)
    assert_accurate(found, same, torch.cat(exact if gate_first else exact[::-1], -1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_as_accurate_as_pytorch(device, dtype, name):
    """Would break if a function or its ratio were another's, or lost digits somewhere."""
    x = torch.cat([values((300,), dtype, device) * 3, values((100,), dtype, device) * 1e-3])
    check_activation(x, values((2, 400), dtype, device), name)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", NAMES)
def test_activations_at_the_edges(device, name, edge):
    """Would break if 0 were divided by 0, or an exponential overflowed into NaN."""
    if edge == "large":  # beyond 700 the definitions overflow themselves
        x = values((3, 70), torch.float32, device).sign() * 300
    else:
        x = values((3, 70), torch.float32, device, edge)
    check_activation(x, values((3, 70), torch.float32, device), name)


def test_limits_of_relu(device):
    """Would break if ReLU of -inf became NaN through -inf * 0, or NaN became 0."""
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, -0.0, 1.0], device=device)
    found = kernel.run_activation(x, "relu")
    torch.testing.assert_close(found, torch.relu(x), equal_nan=True, rtol=0, atol=0)


@TILES
@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_as_accurate_as_pytorch(device, dtype, name, tile):
    """Would break if a share went to the wrong factor, or one of K coefficients to another's place."""
    a, b, g = (values((3, 3, 45), dtype, device) for _ in range(3))
    check_gate(g, a, b, name, 0.25, 0.75, tile)
    check_gate(values((2, 3, 3, 45), dtype, device), a, b, name, tile=tile)


@TILES
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("columns", [1, 32, 75])
def test_packed_gates(device, columns, gate_first, tile):
    """Would break if the halves changed places, or a tile reached into the other half."""
    packed = values((3, 2, 2 * columns), torch.bfloat16, device)
    for g in (
        values((3, 2, columns), torch.bfloat16, device),
        values((2, 3, 2, columns), torch.bfloat16, device),
    ):
        check_packed(g, packed, "silu", gate_first, 0.25, 0.75, tile)
        check_packed(g, packed, "silu", gate_first, 0.0, 1.0, tile)
    a, b = reference.halves(packed, gate_first)
    expected = reference.gate(a, b, "silu")
    assert_accurate(kernel.run_gate(a, b, "silu", tile), expected, exact_value(a, "silu") * b.double())


@pytest.mark.parametrize("gate_first", [True, False])
def test_a_frozen_gate_does_not_read_the_other_factor(device, gate_first):
    """Would break if a factor without a share let an infinity of the other one become NaN."""
    packed, g = values((3, 64), torch.float32, device), values((3, 32), torch.float32, device)
    b = reference.halves(packed, gate_first)[1]
    b[0, 0], b[1, 1] = torch.inf, torch.nan
    found = kernel.run_packed_gate_relevance(g, packed, "silu", gate_first, 0.0, 1.0)
    assert found.isfinite().all() and (reference.halves(found, gate_first)[0] == 0).all()


@TILES
@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows apart"])
def test_layouts(device, layout, tile):
    """Would break if a tensor were read with another tensor's strides, or as one row although it has gaps."""
    plain, apart = (values((4, 70), torch.float32, device) for _ in range(2))
    apart = strided(apart, layout)
    check_activation(apart, plain, "silu", tile)
    check_activation(plain, apart, "silu", tile)
    check_gate(plain, apart, plain, "silu", tile=tile)
    check_gate(apart, plain, apart, "silu", tile=tile)
    check_gate(strided(values((2, 4, 70), torch.float32, device), layout), plain, plain, "silu", tile=tile)
    check_packed(plain[:, :35], apart, "silu", True, tile=tile)


@pytest.mark.parametrize("shape", [(), (1,), (7, 1), (2, 3, 5)])
def test_small_shapes(device, shape):
    """Would break for tensors without dimensions or with one column."""
    a, b, g = (values((1, *shape), torch.float32, device)[0] for _ in range(3))
    check_activation(a, g, "gelu")
    check_gate(g, a, b, "gelu")


@settings(max_examples=6)
@given(data=st.data())
def test_shapes(device, data):
    """Would break for a shape that none of the others have."""
    rows, columns, k = (data.draw(st.integers(1, n)) for n in (6, 90, 3))
    tile = Tile(*(2 ** data.draw(st.integers(low, high)) for low, high in ((1, 3), (4, 7))), 4)
    g, packed = values((k, rows, columns), device=device), values((rows, 2 * columns), device=device)
    check_packed(g, packed, "gelu", data.draw(st.booleans()), tile=tile)
    a, b = reference.halves(packed, True)
    check_gate(g, a.contiguous() if data.draw(st.booleans()) else a, b, "gelu", tile=tile)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (2, 0, 6)])
def test_nothing_is_launched_for_empty_tensors(device, shape):
    """Would break if an empty grid were an error."""
    empty, g = torch.zeros(shape, device=device), torch.zeros((2, *shape), device=device)
    assert ops.activation(empty, "silu").shape == shape
    assert ops.activation_relevance(g, empty, "silu").shape == g.shape
    assert ops.gate(empty, g, "silu").shape == g.shape
    assert all(c.shape == g.shape for c in ops.gate_relevance(g, empty, empty, "silu"))
    assert ops.packed_gate(empty, "silu").shape == (*shape[:-1], shape[-1] // 2)
    assert ops.packed_gate_relevance(g[..., : shape[-1] // 2], empty, "silu").shape == g.shape


@pytest.mark.parametrize("columns", [1, 33, 256, 768, 1536, 4096, 11008, 14336, 28672])
def test_tiles_are_powers_of_2_of_one_size(columns):
    """Would break if a tile could not be made, or lanes were idle that need not be."""
    tile = kernel._tile(columns, 2048)
    assert tile.rows * tile.columns == 2048 and tile.columns & (tile.columns - 1) == 0
    assert columns % tile.columns == 0 or columns < 256


@pytest.mark.parametrize("name", [n for n in NAMES if n in RATIOS])
def test_relevance_of_activations_is_the_rules(name):
    """Would break if an activation meant another function, or another ratio, than the compiler's rule."""
    x, g = (values((3, 70), torch.float64) for _ in range(2))
    step = Identity().linearize(Call(getattr(torch.nn.functional, name), (x,), {}, (0,)))
    torch.testing.assert_close(ops.activation(x, name), step.output, rtol=0, atol=1e-12)
    torch.testing.assert_close(ops.activation_relevance(g, x, name), step.pullback(g)[0], rtol=0, atol=1e-12)


def test_relevance_of_gates_is_the_rules():
    """Would break if the shares or the order of product and activation were not as in the compiler."""
    a, b, g = (values((3, 70), torch.float64) for _ in range(3))
    inner = Identity().linearize(Call(aten.silu.default, (a,), {}, (0,)))
    outer = Uniform().linearize(Call(aten.mul.Tensor, (inner.output, b), {}, (0, 1)))
    of_f, of_b = outer.pullback(g)
    found = ops.gate_relevance(g, a, b, "silu")
    torch.testing.assert_close(ops.gate(a, b, "silu"), outer.output, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, (inner.pullback(of_f)[0], of_b), rtol=0, atol=1e-12)
    packed = ops.packed_gate_relevance(g, torch.cat([b, a], -1), "silu", False)
    torch.testing.assert_close(packed, torch.cat(found[::-1], -1), rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """Would break if elements were found with 32-bit offsets, in one long row or in many."""
    x = torch.ones((2**19 + 1, 4098), dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = -1.0
    assert ops.activation(x, "relu")[-1].tolist() == [1.0] * 4097 + [0.0]
    assert ops.packed_gate(x, "relu", False)[-1].tolist() == [1.0] * 2048 + [0.0]

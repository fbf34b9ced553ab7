"""Norms, the residual sum before them, and the LN-rule's relevance against float64 and the rule."""

import itertools

import pytest

pytest.importorskip("triton")

import torch
from common import DTYPES, EDGES, assert_accurate, checked, strided, values
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlrp.kernels import norm as ops
from fxlrp.kernels.norm import kernel, reference
from fxlrp.kernels.rows import Tile
from fxlrp.rules import NormRule
from fxlrp.rules.base import Call

ONE = Tile(4, 256, 4)
LOOPED = Tile(2, 32, 4, loops=True)
TILES = pytest.mark.parametrize("tile", [ONE, LOOPED], ids=str)
FORMS = pytest.mark.parametrize("centred", [False, True], ids=["RMSNorm", "LayerNorm"])


def exact_norm(h, weight, bias, eps, offset, centred):
    """Row by row, in float64."""
    rows = []
    for row in h.double().reshape(-1, h.shape[-1]):
        centre = row - row.sum() / len(row) if centred else row
        rows.append(centre / ((centre**2).sum() / len(row) + eps).sqrt())
    y = torch.stack(rows).reshape(h.shape) * (1.0 if weight is None else offset + weight.double())
    return y if bias is None else y + bias.double()


def exact_rstd(h, eps, centred):
    return (h.double().var(-1, correction=0) + h.double().mean(-1) ** 2 * (not centred) + eps).rsqrt()[
        ..., None
    ]


def exact_relevance(g, rstd, weight, added, share, offset, centred):
    """The transpose of ``x -> (offset + w) * C x * rstd`` as a matrix, times G."""
    n = g.shape[-1]
    eye = torch.eye(n, dtype=torch.float64, device=g.device)
    matrix = eye - 1 / n if centred else eye
    if weight is not None:
        matrix = matrix * (offset + weight.double())  # C is symmetric: C diag(w)
    found = share * rstd.double() * (g.double() @ matrix.T)
    return found if added is None else found + added.double()


def check_norm(x, residual, weight, bias, eps, offset, centred, tile=None):
    with checked(x) as (inside,):
        y, h, rstd = kernel.run_norm(inside, residual, weight, bias, eps, offset, centred, tile)
    if residual is not None:
        assert_accurate(h, x + residual, x.double() + residual.double(), name="h")
    # The interpreter rounds bfloat16 down, so that the norm is that of the h it found.
    same_y, same_rstd = reference.norm(h, weight, bias, eps, offset, centred)
    assert y.is_contiguous() and rstd.shape == (*x.shape[:-1], 1)
    assert_accurate(y, same_y, exact_norm(h, weight, bias, eps, offset, centred), name="y")
    assert_accurate(rstd, same_rstd, exact_rstd(h, eps, centred), name="rstd")


def check_relevance(g, rstd, weight, added, share, offset, centred, tile=None):
    with checked(g, rstd) as (g_inside, rstd_inside):
        found = kernel.run_relevance(g_inside, rstd_inside, weight, added, share, offset, centred, tile)
    assert found.is_contiguous() and found.dtype == g.dtype
    same = reference.norm_relevance(g, rstd, weight, added, share, offset, centred)
    assert_accurate(found, same, exact_relevance(g, rstd, weight, added, share, offset, centred))


@FORMS
@TILES
@pytest.mark.parametrize("columns", [1, 32, 75])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_as_accurate_as_pytorch(device, dtype, columns, tile, centred):
    """Would break if a remainder of rows or columns, or a further tile, counted wrongly in the statistics."""
    x, residual = (values((3, 3, columns), dtype, device) for _ in range(2))
    weight, bias = (values((columns,), dtype, device) for _ in range(2))
    check_norm(x, None, weight, None, 1e-6, 1.0, centred, tile)
    check_norm(x, residual, weight, bias, 1e-5, 0.0, centred, tile)


@FORMS
@TILES
def test_without_weight(device, tile, centred):
    """Would break if an absent weight counted as 0, or let the offset in."""
    x = values((5, 70), torch.float32, device)
    check_norm(x, None, None, None, 1e-6, 3.0, centred, tile)
    check_norm(x, None, None, values((70,), torch.float32, device), 1e-6, 0.0, centred, tile)
    check_relevance(x, values((5, 1), device=device).abs(), None, None, 1.0, 3.0, centred, tile)


@FORMS
@TILES
@pytest.mark.parametrize("edge", EDGES)
def test_norm_at_the_edges(device, edge, tile, centred):
    """Would break if a row of zeros were divided by 0."""
    x, weight = values((3, 70), torch.float32, device, edge), values((70,), torch.float32, device)
    check_norm(x, None, weight, None, 1e-6, 0.0, centred, tile)


@TILES
def test_a_large_mean_costs_no_digits(device, tile):
    """Would break if the variance were the difference of two large numbers."""
    x = values((3, 70), torch.float32, device) + 1000
    check_norm(x, None, None, None, 1e-6, 0.0, True, tile)
    y, *_ = kernel.run_norm(x, None, None, None, 1e-6, 0.0, True, tile)
    assert float((y - exact_norm(x, None, None, 1e-6, 0.0, True)).abs().max()) < 1e-3


@TILES
def test_the_residual_sum_is_rounded_first(device, tile):
    """Would break if the norm saw digits of the sum that the model's own does not have."""
    x, residual = values((3, 70), torch.bfloat16, device) * 8, values((3, 70), torch.bfloat16, device)
    y, h, rstd = kernel.run_norm(x, residual, None, None, 1e-6, 0.0, False, tile)
    again, _, rstd_again = kernel.run_norm(h, None, None, None, 1e-6, 0.0, False, tile)
    assert torch.equal(y, again) and torch.equal(rstd, rstd_again)


@TILES
def test_dtypes_mix(device, tile):
    """Would break if a tensor were read in another's dtype; a sum has the dtype that PyTorch gives it."""
    x = values((3, 70), torch.bfloat16, device)
    residual, weight = values((3, 70), torch.float32, device), values((70,), torch.float16, device)
    check_norm(x, residual, weight, None, 1e-6, 0.0, True, tile)
    check_relevance(x, values((3, 1), torch.bfloat16, device).abs(), weight, residual, 1.0, 0.0, True, tile)


@FORMS
@TILES
@pytest.mark.parametrize("columns", [1, 32, 75])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relevance_is_as_accurate_as_pytorch(device, dtype, columns, tile, centred):
    """Would break if the mean missed a tile, or one of K coefficients took another's."""
    rstd, weight = values((3, 3, 1), device=device).abs(), values((columns,), dtype, device)
    g, added = (values((2, 3, 3, columns), dtype, device) for _ in range(2))
    check_relevance(g, rstd, weight, added, 0.5, 1.0, centred, tile)
    check_relevance(g[0], rstd, weight, None, 1.0, 0.0, centred, tile)


@FORMS
@pytest.mark.parametrize("edge", EDGES)
def test_relevance_at_the_edges(device, edge, centred):
    """Would break if coefficients of 0, subnormal or large ones were not as PyTorch's."""
    rstd, weight = values((3, 1), device=device).abs(), values((70,), device=device)
    check_relevance(
        values((3, 70), torch.float32, device, edge), rstd, weight, None, 1.0, 0.0, centred, LOOPED
    )


@FORMS
@TILES
@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows apart"])
def test_layouts(device, layout, tile, centred):
    """Would break if a tensor were read with another tensor's strides."""
    x, plain = strided(values((4, 70), torch.float32, device), layout), values((4, 70), device=device)
    weight, rstd = values((140,), device=device)[::2], values((4, 2), device=device)[:, :1].abs()
    check_norm(x, plain, weight, None, 1e-6, 0.0, centred, tile)
    check_norm(plain, x, weight, weight, 1e-6, 0.0, centred, tile)
    check_relevance(x, rstd, weight, plain, 1.0, 0.0, centred, tile)
    check_relevance(
        torch.stack([plain, plain]), rstd, weight, torch.stack([x, x]).mT.mT, 1.0, 0.0, centred, tile
    )


@settings(max_examples=8)
@given(data=st.data())
def test_shapes(device, data):
    """Would break for a shape that none of the others have."""
    rows, columns, k = (data.draw(st.integers(1, n)) for n in (6, 90, 3))
    centred = data.draw(st.booleans())
    tile = Tile(2 ** data.draw(st.integers(1, 3)), 2 ** data.draw(st.integers(4, 7)), 4)
    tile = Tile(tile.rows, tile.columns, 4, loops=tile.columns < columns or data.draw(st.booleans()))
    x, weight = values((rows, columns), device=device), values((columns,), device=device)
    check_norm(x, x.flip(-1), weight, None, 1e-3, 0.0, centred, tile)
    g, rstd = values((k, rows, columns), device=device), values((rows, 1), device=device).abs()
    check_relevance(g, rstd, weight, g.flip(-1), 1.0, 0.0, centred, tile)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)])
def test_nothing_is_launched_for_empty_tensors(device, shape):
    """Would break if an empty grid or an empty reduction were an error."""
    empty = torch.zeros(shape, device=device)
    y, h, rstd = ops.add_norm(empty, empty)
    assert y.shape == h.shape == shape and rstd.shape == (*shape[:-1], 1)
    assert ops.norm(empty)[0].shape == shape
    assert ops.norm_relevance(torch.zeros((2, *shape), device=device), rstd).shape == (2, *shape)


def test_every_width_has_a_tile_that_holds_it():
    """Would break if a row were longer than its tile and the program did not go on."""
    every = (kernel.TILES, *kernel.RELEVANCE_TILES.values())
    for tiles, itemsize in itertools.product(every, (2, 4)):
        widest = tiles.widest // itemsize
        for columns in (1, 33, 1000, widest, widest + 1, 65536):
            tile = tiles.of(columns, itemsize)
            assert tile in tiles.all(itemsize) and (tile.columns >= columns) != tile.loops


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_relevance_is_the_rules(op):
    """Would break if the ops meant another norm or another rule than the compiler's."""
    x, g = (values((3, 70), torch.float64) for _ in range(2))
    weight, bias = (values((70,), torch.float64) for _ in range(2))
    if op == "layer_norm":
        call = Call(torch.ops.aten.layer_norm.default, (x, [70], weight, bias, 1e-3), {}, (0,))
        y, rstd = ops.norm(x, weight, bias, 1e-3, 0.0, True)
    else:
        call = Call(torch.ops.aten.rms_norm.default, (x, [70], weight, 1e-3), {}, (0,))
        y, rstd = ops.norm(x, weight, None, 1e-3)
    step = NormRule().linearize(call)
    torch.testing.assert_close(y, step.output, rtol=0, atol=1e-12)
    found = ops.norm_relevance(g, rstd, weight, centred=op == "layer_norm")
    torch.testing.assert_close(found, step.pullback(g)[0], rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """Would break if rows were found with 32-bit offsets."""
    g = torch.ones((2**19 + 1, 4097), dtype=torch.bfloat16, device="cuda")
    g[-1, 0] = 3.0
    rstd = torch.ones((len(g), 1), device="cuda")
    found = ops.norm_relevance(g, rstd, centred=True)[-1]
    torch.testing.assert_close(found, reference.norm_relevance(g[-1], rstd[-1], None, None, 1.0, 0.0, True))

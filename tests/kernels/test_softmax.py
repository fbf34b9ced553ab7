"""The softmax and its relevance against float64, the rule, and PyTorch's own machinery."""

import itertools

import pytest

pytest.importorskip("triton")

import torch
from common import DTYPES, EDGES, MASKS, additive, assert_accurate, checked, strided, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxlrp.kernels import softmax as ops
from fxlrp.kernels.rows import Tile
from fxlrp.kernels.softmax import kernel, reference
from fxlrp.rules import SoftmaxTaylor
from fxlrp.rules.base import Call

ONE = Tile(4, 256, 4)
LOOPED = Tile(2, 32, 4, loops=True)
TILES = pytest.mark.parametrize("tile", [ONE, LOOPED], ids=str)


def exact_softmax(scores, mask, scale):
    """exp(z) / sum(exp(z)), row by row; 0 where no entry is finite."""
    z = scale * scores.double()
    if mask is not None:
        z = torch.where(mask, z, -torch.inf) if mask.dtype == torch.bool else z + mask.double()
    z = z.reshape(-1, z.shape[-1])
    rows = [
        torch.zeros_like(r)
        if bool((r == -torch.inf).all())
        else (r - r.max()).exp() / (r - r.max()).exp().sum()
        for r in z
    ]
    return torch.stack(rows).reshape(scores.shape)


def exact_relevance(g, s, scale):
    """The product with the matrix ``scale * (diag(s) - s s^T)`` of every row."""
    jacobian = scale * (torch.diag_embed(s.double()) - s.double().unsqueeze(-1) * s.double().unsqueeze(-2))
    return (jacobian @ g.double().unsqueeze(-1)).squeeze(-1)


def check_softmax(scores, mask, scale, tile=None, dtype=None):
    dtype = dtype or scores.dtype
    with checked(scores) as (inside,):
        found = kernel.run_softmax(inside, mask, scale, dtype, tile)
    same = reference.softmax(scores, mask, scale, dtype)
    assert found.is_contiguous() and found.dtype == dtype
    assert_accurate(found, same, exact_softmax(scores, mask, scale).to(found.device))


def check_relevance(g, s, scale, tile=None):
    with checked(g, s) as (g_inside, s_inside):
        found = kernel.run_relevance(g_inside, s_inside, scale, tile)
    assert found.is_contiguous() and found.dtype == g.dtype
    assert_accurate(found, reference.softmax_relevance(g, s, scale), exact_relevance(g, s, scale))


@TILES
@pytest.mark.parametrize("columns", [1, 32, 75])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_is_as_accurate_as_pytorch(device, dtype, columns, tile):
    """Would break if a remainder of rows or columns, or a further tile, were summed wrongly."""
    check_softmax(values((3, 3, columns), dtype, device) * 4, None, 0.7, tile)


@TILES
@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks(device, name, is_added, tile):
    """Would break if a masked entry got a share, or a row without any other became NaN."""
    mask = MASKS[name](5, 70).to(device)
    scores = values((1, 2, 5, 70), torch.float32, device)
    check_softmax(scores, additive(mask) if is_added else mask, 1.0, tile)
    found = kernel.run_softmax(scores, mask, 1.0, torch.float32, tile)
    assert (found[..., ~mask.any(-1), :] == 0).all() and (found[..., ~mask] == 0).all()


@TILES
@pytest.mark.parametrize(
    "shape", [(1,), (70,), (5, 1), (3, 1, 70), (2, 1, 1, 70), (2, 3, 5, 70), (1, 1, 5, 70)]
)
def test_masks_broadcast(device, shape, tile):
    """Would break if a mask were read with a stride along a dimension that it has not."""
    scores = values((2, 3, 5, 70), torch.bfloat16, device)
    check_softmax(scores, values(shape, torch.float32, device), 0.5, tile)
    check_softmax(scores, (values(shape, torch.float32, device) < 1.5), 0.5, tile)


@pytest.mark.parametrize("shape", [(70,), (5, 70), (2, 1, 3, 5, 70)])
def test_other_numbers_of_dimensions_take_a_mask(device, shape):
    """Would break if rows were counted over batch, heads and queries where there are more or fewer."""
    mask = values(shape[-2:], torch.float32, device)
    check_softmax(values(shape, torch.float32, device), mask, 1.0, LOOPED)


@TILES
@pytest.mark.parametrize("edge", EDGES)
def test_softmax_at_the_edges(device, edge, tile):
    """Would break if large scores overflowed or equal ones did not share alike."""
    check_softmax(values((3, 70), torch.float32, device, edge), None, 1.0, tile)


@TILES
def test_infinite_scores(device, tile):
    """Would break if inf or NaN in a row spared the row's result, or reached another row."""
    scores = values((4, 70), torch.float32, device)
    scores[0, 3], scores[1, 40], scores[2, 65] = torch.inf, torch.nan, -torch.inf
    found = kernel.run_softmax(scores, None, 1.0, torch.float32, tile)
    assert found[:2].isnan().all() and found[2:].isfinite().all()
    assert found[2, 65] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_in_another_dtype(device, dtype):
    """Would break if probabilities were rounded to the scores' dtype first."""
    check_softmax(values((3, 70), torch.bfloat16, device), None, 1.0, dtype=dtype)


@TILES
@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows apart"])
def test_layouts(device, layout, tile):
    """Would break if a tensor were read with another tensor's strides."""
    scores = strided(values((4, 70), torch.float32, device), layout)
    g = strided(values((4, 70), torch.float32, device), layout)
    check_softmax(scores, None, 1.0, tile)
    check_softmax(values((4, 70), torch.float32, device), scores, 1.0, tile)
    check_relevance(g, strided(scores.softmax(-1), layout), 0.3, tile)


def test_rows_that_are_one(device):
    """Would break if rows were found by counting where they all lie in one place."""
    s = values((1, 70), torch.float32, device).softmax(-1)
    g = values((1, 1, 70), torch.float32, device)
    found = kernel.run_relevance(g.expand(2, 3, 70), s.expand(3, 70), 1.0, LOOPED)
    assert_accurate(
        found[1, 2], reference.softmax_relevance(g, s, 1.0)[0, 0], exact_relevance(g, s, 1.0)[0, 0]
    )


@TILES
@pytest.mark.parametrize("columns", [1, 32, 75])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relevance_is_as_accurate_as_pytorch(device, dtype, columns, tile):
    """Would break if the sum missed a tile, or a coefficient of K took another's sum."""
    s = (values((3, 3, columns), torch.float32, device) * 3).softmax(-1).to(dtype)
    check_relevance(values((3, 3, columns), dtype, device), s, 0.3, tile)
    check_relevance(values((2, 3, 3, columns), dtype, device), s, 1.7, tile)


@pytest.mark.parametrize("edge", EDGES)
def test_relevance_at_the_edges(device, edge):
    """Would break if coefficients of 0, subnormal or large ones were not as PyTorch's."""
    s = values((3, 70), torch.float32, device).softmax(-1)
    check_relevance(values((3, 70), torch.float32, device, edge), s, 1.0, LOOPED)


@settings(max_examples=8)
@given(data=st.data())
def test_shapes(device, data):
    """Would break for a shape that none of the others have."""
    rows, columns, k = (data.draw(st.integers(1, n)) for n in (6, 90, 3))
    tile = Tile(*(2 ** data.draw(st.integers(low, high)) for low, high in ((1, 3), (4, 7))), 4)
    tile = Tile(tile.rows, tile.columns, 4, loops=tile.columns < columns or data.draw(st.booleans()))
    mask = values((rows, columns), torch.float32, device) < data.draw(st.sampled_from([-9.0, 0.0, 9.0]))
    scores = values((rows, columns), torch.float32, device)
    check_softmax(scores, mask, 1.0, tile)
    check_relevance(values((k, rows, columns), torch.float32, device), scores.softmax(-1), 1.0, tile)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)])
def test_nothing_is_launched_for_empty_tensors(device, shape):
    """Would break if an empty grid or an empty reduction were an error."""
    empty = torch.zeros(shape, device=device)
    assert ops.softmax(empty).shape == shape
    assert ops.softmax_relevance(torch.zeros((2, *shape), device=device), empty).shape == (2, *shape)


def test_every_width_has_a_tile_that_holds_it():
    """Would break if a row were longer than its tile and the program did not go on."""
    for tiles, itemsize in itertools.product((kernel.TILES, kernel.RELEVANCE_TILES), (2, 4)):
        widest = tiles.widest // itemsize
        for columns in (1, 33, 1000, widest, widest + 1, 131072):
            tile = tiles.of(columns, itemsize)
            assert tile in tiles.all(itemsize) and (tile.columns >= columns) != tile.loops


def test_symbolic_columns_get_a_tile_for_any_size_without_a_guard():
    """Would break if choosing a tile fixed a sequence's length, or the tile were wrong for another one."""
    env = ShapeEnv()
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    mode = FakeTensorMode(shape_env=env)
    fake = mode.from_tensor(torch.zeros(200), symbolic_context=dynamic, source=ConstantSource("x"))
    tile = kernel.RELEVANCE_TILES.of(fake.shape[0], 2)
    assert tile == Tile(8, 256, 8, loops=True) and tile in kernel.RELEVANCE_TILES.all(2)
    assert not env.guards


def test_relevance_is_the_rules():
    """Would break if the op meant another rule than the compiler's."""
    scores, g = (values((3, 70), torch.float64) for _ in range(2))
    step = SoftmaxTaylor().linearize(Call(torch.softmax, (scores, -1), {}, (0,)))
    s = ops.softmax(scores)
    torch.testing.assert_close(s, step.output, rtol=0, atol=1e-12)
    torch.testing.assert_close(ops.softmax_relevance(g, s), step.pullback(g)[0], rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """Would break if rows were found with 32-bit offsets."""
    s = torch.zeros((2**19 + 1, 4097), dtype=torch.bfloat16, device="cuda")
    s[-1], g = 1 / 4096, torch.ones_like(s)
    g[-1, 0] = 3.0
    found = ops.softmax_relevance(g, s)[-1]
    torch.testing.assert_close(found, reference.softmax_relevance(g[-1], s[-1], 1.0))

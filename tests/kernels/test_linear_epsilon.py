"""The epsilon rule's fused product against float64, the rule, and PyTorch's own machinery."""

import pytest

pytest.importorskip("triton")

import interpreter
import torch
from common import DTYPES, EDGES, assert_accurate, checked, strided, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxlrp.kernels import linear_epsilon as ops
from fxlrp.kernels.linear_epsilon import kernel, reference
from fxlrp.kernels.matmul import Table, Tiles, hint
from fxlrp.rules import Epsilon
from fxlrp.rules.base import Call

SMALL = Tiles(16, 32, 16, warps=4, stages=2)
CHOSEN = pytest.mark.parametrize("chosen", [(SMALL, 1), (SMALL, 3)], ids=["whole", "in parts"])


@pytest.fixture(autouse=True)
def right_about_bfloat16():
    with interpreter.bfloat16():
        yield


def exact(g, z, weight, epsilon, x=None):
    """``sum_j w_ji g_j z_j / (z_j + epsilon * sign(z_j))``, the rule of the paper, divided by x or not."""
    g, z, weight = g.double(), z.double(), weight.double()
    epsilon = epsilon.double() if isinstance(epsilon, torch.Tensor) else epsilon
    stabilised = z + epsilon * torch.where(z < 0, -1.0, 1.0)
    coefficient = torch.einsum("...o,oi->...i", g * torch.where(z == 0, 0.0, z / stabilised), weight)
    return coefficient if x is None else coefficient * x.double()


def check(g, z, weight, epsilon, rows=None, x=None, chosen=None):
    inputs = [t for t in (g, z, weight, rows, x) if t is not None]
    with checked(*inputs) as copies:
        it = iter(copies)
        g1, z1, weight1, rows1, x1 = (None if t is None else next(it) for t in (g, z, weight, rows, x))
        found = kernel.relevance(g1, z1, weight1, epsilon, rows1, x1, False, chosen)
    same = reference.relevance(g, z, weight, epsilon, rows, x)
    assert found.is_contiguous()
    assert_accurate(found, same, exact(g, z, weight, epsilon if rows is None else rows, x))


def operands(shape, out, into, dtype, device, count=None, edge="normal"):
    g = values((*((count,) if count else ()), *shape, out), dtype, device)
    return g, *(values(s, dtype, device, edge) for s in ((*shape, out), (out, into), (*shape, into)))


@CHOSEN
@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_are_as_accurate_as_pytorch(device, dtype, count, chosen):
    """Would break if a tile, a part of the reduction or one of several coefficients were summed wrongly."""
    g, z, weight, x = operands((2, 9), 70, 45, dtype, device, count)
    check(g, z, weight, 0.3, chosen=chosen)
    check(g, z, weight, 0.3, x=x, chosen=chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20, 50])
def test_what_launches_choose(device, dtype, rows):
    """Would break if the tiles of a size class computed something else."""
    g, z, weight, x = operands((rows,), 130, 300, dtype, device)
    check(g, z, weight, 0.3, x=x)


def test_an_epilogue_in_halves(device):
    """Would break if a wide tile's second half went elsewhere."""
    g, z, weight, x = operands((9,), 20, 300, torch.float32, device, 2)
    check(g, z, weight, 0.3, x=x, chosen=(Tiles(16, 256, 16, warps=4, stages=2), 1))


@CHOSEN
def test_each_row_has_its_own_stabiliser(device, chosen):
    """Would break if a row took another's epsilon, or coefficients of one value different ones."""
    g, z, weight, _ = operands((3, 7), 33, 20, torch.float32, device, 2)
    rows = torch.rand(3, 7, 1, device=device) + 0.1
    check(g, z, weight, 0.0, rows, chosen=chosen)
    check(g, z, weight, 0.0, torch.full((1, 1), 0.4, device=device), chosen=chosen)


def test_coefficients_that_are_one_in_memory(device):
    """Would break if a stride of 0 were not followed: the same coefficient for every sample."""
    g, z, weight, _ = operands((3, 7), 33, 20, torch.float32, device, 2)
    found = kernel.relevance(g[:, :1].expand_as(g), z, weight, 0.3, None, None, False)
    expected = kernel.relevance(g[:, :1].repeat(1, 3, 1, 1), z, weight, 0.3, None, None, False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_edges(device, dtype, edge):
    """Would break if zeros gave NaN, subnormals their coefficient's full size, or large values infinity."""
    g, z, _, _ = operands((9,), 40, 20, dtype, device, edge=edge)
    check(g, z, values((40, 20), dtype, device), 1e-3, chosen=(SMALL, 1))


@CHOSEN
@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows apart"])
def test_strides(device, chosen, layout):
    """Would break if a stride were taken for that of a contiguous tensor."""
    g, z, weight, x = operands((2, 9), 33, 20, torch.float32, device, 2)
    check(*(strided(t, layout) for t in (g, z, weight)), 0.3, x=strided(x, layout), chosen=chosen)


@settings(max_examples=12)
@given(
    count=st.sampled_from([None, 1, 2, 5]),
    shape=st.sampled_from([(), (1,), (17,), (3, 5), (2, 1, 9)]),
    out=st.integers(1, 40),
    into=st.integers(1, 40),
    parts=st.integers(1, 4),
)
def test_any_shape(device, count, shape, out, into, parts):
    """Would break at a remainder in one dimension, or where a part of the reduction is empty."""
    g, z, weight, x = operands(shape, out, into, torch.float32, device, count)
    check(g, z, weight, 0.2, x=x, chosen=(SMALL, parts))


@pytest.mark.parametrize("shape, out, into", [((0, 3), 5, 6), ((2,), 0, 6), ((2,), 5, 0)])
def test_empty(device, shape, out, into):
    """Would break if nothing were launched over, or an empty sum left memory as it was."""
    g, z, weight, _ = operands(shape, out, into, torch.float32, device)
    found = kernel.relevance(g, z, weight, 0.1, None, None, False)
    assert found.shape == (*shape, into) and (found == 0).all()


@pytest.mark.parametrize("rule", [Epsilon(0.2), Epsilon(0.25, relative=True), Epsilon(0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_derivative_of_the_op_is_the_rule(device, dtype, rule):
    """Would break if the op and the rule that the compiler assigns were two rules."""
    g, _, weight, x = operands((2, 3), 7, 5, dtype, device)
    bias = values((7,), dtype, device)
    call = Call(torch.ops.aten.linear.default, (x, weight, bias), {}, (0,))
    x1 = x.clone().requires_grad_()
    z = ops.linear_epsilon(x1, weight, bias, rule.epsilon, rule.relative)
    (found,) = torch.autograd.grad(z, x1, g)
    (expected,) = rule.linearize(call).pullback(g)
    assert torch.equal(z, rule.linearize(call).output)
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance))


def test_the_relevance_op_is_linear_in_coefficients():
    """Would break if its own derivative were that of another map."""
    g, z, weight, x = operands((2, 3), 7, 5, torch.float64, "cpu", 2)
    rows = torch.rand(2, 3, 1, dtype=torch.float64)
    for epsilon, of_rows, times in ((0.1, None, None), (0.0, rows, x), (0.0, None, x)):
        assert torch.autograd.gradcheck(
            lambda g, e=epsilon, r=of_rows, t=times: ops.linear_epsilon_relevance(g, z, weight, e, r, t),
            g.requires_grad_(),
        )


def test_opcheck():
    """Would break if a schema, a fake result or a derivative were not what PyTorch takes it for."""
    g, z, weight, x = operands((2, 3), 7, 5, torch.float64, "cpu", 2)
    rows = torch.rand(2, 3, 1, dtype=torch.float64)
    torch.library.opcheck(ops.linear_epsilon_relevance, (g.requires_grad_(), z, weight, 0.1, rows, x))
    torch.library.opcheck(ops.linear_epsilon, (x.requires_grad_(), weight, None, 0.1, True))


def test_it_compiles_whole():
    """Would break if a graph broke at the op, or sizes of rows became constants."""
    compiled = torch.compile(
        lambda g, z, weight, x: ops.linear_epsilon_relevance(g, z, weight, 0.1, None, x),
        fullgraph=True,
        dynamic=True,
    )
    # PyTorch's cache knows these ops by name and not by what they are made of.
    fresh = torch._inductor.config.patch(force_disable_caches=True)
    with torch._dynamo.config.patch(error_on_recompile=True), fresh:
        for rows in (3, 6):
            inputs = operands((rows,), 7, 5, torch.float32, "cpu")
            same = ops.linear_epsilon_relevance(*inputs[:3], 0.1, None, inputs[3])
            torch.testing.assert_close(compiled(*inputs), same)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, ""),
        ({"epsilon": 0.0}, "no factor"),
        ({"z": torch.zeros(3, 4, dtype=torch.float16)}, "one dtype"),
        ({"weight": torch.zeros(4)}, "W [out, in]"),
        ({"g": torch.zeros(2, 2, 3, 4)}, "W [out, in]"),
        ({"g": torch.zeros(1, 4)}, "belong together"),
        ({"weight": torch.zeros(3, 5)}, "belong together"),
        ({"x": torch.zeros(3, 4)}, "belong together"),
        ({"tf32": False}, "TensorFloat-32"),
        (dict.fromkeys(("g", "z", "weight"), torch.zeros(4, 4, dtype=torch.float64)), "float64"),
    ],
)
def test_refusals(change, reason):
    """Would break if a kernel were launched on what it does not take, or the reason were lost."""
    given = {"g": torch.zeros(3, 4), "z": torch.zeros(3, 4), "weight": torch.zeros(4, 5)}
    given |= {"x": torch.zeros(3, 5), "epsilon": 0.1, "tf32": True}
    is_fit, why = ops.can_run(**(given | change))
    if torch.cuda.is_available():
        pytest.skip("on a machine with a CUDA device, tensors on the CPU are refused as such")
    assert is_fit == (not reason)
    assert reason in why


TABLE = Table(
    few=(Tiles(16, 64, 64, 4, 3), Tiles(64, 128, 64, 4, 3)),
    many=(Tiles(128, 256, 64, 8, 3, shared=200), Tiles(64, 64, 64, 4, 3)),
)


@pytest.mark.parametrize(
    "sizes, shared, expected",
    [
        ((1, 4096, 4096), 227, (TABLE.few[0], 4)),
        ((64, 4096, 4096), 227, (TABLE.few[1], 8)),
        ((64, 4096, 256), 227, (TABLE.few[1], 1)),
        ((64, 1 << 20, 4096), 227, (TABLE.few[1], 1)),
        ((4096, 4096, 4096), 227, (TABLE.many[0], 1)),
        ((4096, 4096, 4096), 99, (TABLE.many[1], 1)),
        ((512, 2048, 4096), 227, (TABLE.many[1], 1)),
        ((128, 256, 4096), 227, (TABLE.many[1], 16)),
        ((0, 256, 4096), 227, (TABLE.few[0], 16)),
    ],
)
def test_tiles_by_size(sizes, shared, expected):
    """Would break if few rows read weights twice, or a small product left most of the device idle."""
    assert TABLE.choose(*sizes, shared) == expected


def test_a_symbol_counts_as_its_example():
    """Would break if choosing tiles fixed a size of a trace."""
    shapes = ShapeEnv()
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=shapes)
    x = mode.from_tensor(torch.zeros(6, 4), symbolic_context=dynamic, source=ConstantSource("x"))
    assert isinstance(x.shape[0], torch.SymInt)
    assert hint(x.shape) == 24 and hint((2 * x.shape[0],)) == 12
    assert not shapes.guards

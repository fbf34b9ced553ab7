"""Sign splits of linear maps, fused, against float64, the rules, and PyTorch's own machinery."""

import pytest

pytest.importorskip("triton")

import interpreter
import torch
from common import DTYPES, EDGES, assert_accurate, checked, strided, values
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlrp.kernels import linear_split as ops
from fxlrp.kernels.linear_split import kernel, reference
from fxlrp.kernels.matmul import Tiles
from fxlrp.rules import AlphaBeta, Gamma, ZPlus
from fxlrp.rules.base import Call

SMALL = Tiles(16, 32, 16, warps=4, stages=2)
SWAPPED = Tiles(16, 32, 16, warps=4, stages=2, swap=True)
CHOSEN = pytest.mark.parametrize("chosen", [(SMALL, 1), (SWAPPED, 3)], ids=["whole", "swapped, in parts"])
RULES = {
    "gamma": ("gamma", [0.25], 0.0),
    "gamma, stabilised": ("gamma", [2.0], 0.1),
    "alpha-beta": ("alpha_beta", [2.0, 1.0], 0.0),
    "alpha-beta, stabilised": ("alpha_beta", [1.5, 0.5], 0.1),
    "z+": ("alpha_beta", [1.0, 0.0], 0.0),
}
EACH_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.fixture(autouse=True)
def right_about_bfloat16():
    with interpreter.bfloat16():
        yield


def exact_forward(x, weight, bias):
    """Every contribution by itself, and their absolute values."""
    parts = x.double().unsqueeze(-2) * weight.double()
    b = 0.0 if bias is None else bias.double()
    return parts.sum(-1) + b, parts.abs().sum(-1) + abs(b)


def exact_relevance(g, z, absolute, x, weight, rule, strengths, epsilon, times_x):
    """The papers' forms with each weight by itself, from sums P and N of either sign as z and A hold them.
    An input of 0 has contributions of no sign: half of each part is its.
    """
    counts_as_nothing = 4 * torch.finfo(z.dtype).eps * absolute.double()
    z, size, w = z.double(), absolute.double(), weight.double()
    P, N = (z + size) / 2, (z - size) / 2
    sign = x.double().sign().unsqueeze(-2) * w.sign()  # [..., out, in]
    is_positive, is_negative = (1 + sign) / 2, (1 - sign) / 2
    if rule == "gamma":
        (gamma,) = strengths
        own = torch.where(z.unsqueeze(-1) > 0, is_positive, is_negative)
        total = z + gamma * torch.where(z > 0, P, N) + epsilon * z.sign()
        share = (1 + gamma * own) * torch.where(z == 0, 0.0, z / total).unsqueeze(-1)
    else:
        alpha, beta = strengths
        to_positive = torch.where(counts_as_nothing < 2 * P, alpha * z / (P + epsilon), 0.0)
        to_negative = torch.where(counts_as_nothing < -2 * N, beta * z / (N - epsilon), 0.0)
        share = is_positive * to_positive.unsqueeze(-1) - is_negative * to_negative.unsqueeze(-1)
    coefficient = (g.double().unsqueeze(-1) * share * w).sum(-2)
    return coefficient * x.double() if times_x else coefficient


def check_forward(x, weight, bias=None, chosen=None):
    inputs = [t for t in (x, weight, bias) if t is not None]
    with checked(*inputs) as copies:
        found = kernel.forward(*copies[:2], copies[2] if bias is not None else None, False, chosen)
    same, exact = reference.forward(x, weight, bias), exact_forward(x, weight, bias)
    for name, f, s, e in zip("zA", found, same, exact, strict=True):
        assert f.is_contiguous()
        assert_accurate(f, s, e, name=name)


def check_relevance(g, z, absolute, x, weight, rule, times_x=False, chosen=None):
    with checked(g, z, absolute, x, weight) as copies:
        found = kernel.relevance(*copies, *rule, times_x, False, chosen)
    same = reference.relevance(g, z, absolute, x, weight, *rule, times_x)
    assert found.is_contiguous()
    assert_accurate(found, same, exact_relevance(g, z, absolute, x, weight, *rule, times_x))


def operands(shape, out, into, dtype, device, count=None, edge="normal"):
    """g, z, A, x and W; a tenth of the inputs are 0, and one output has positive contributions alone."""
    g = values((*((count,) if count else ()), *shape, out), dtype, device)
    x, weight = values((*shape, into), dtype, device, edge), values((out, into), dtype, device)
    x = torch.where(torch.rand(x.shape, device=device) < 0.1, torch.zeros_like(x), x)
    if out and shape == (9,):
        weight[0] = weight[0].abs() * x[0].sign()
    return g, *reference.forward(x, weight, None), x, weight


@CHOSEN
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_as_accurate_as_pytorch(device, dtype, chosen):
    """Would break if a tile, a part of the reduction or the bias were added twice, or not at all."""
    x, weight = operands((2, 9), 45, 70, dtype, device)[-2:]
    check_forward(x, weight, chosen=chosen)
    check_forward(x, weight, values((45,), dtype, device), chosen=chosen)


@CHOSEN
@EACH_RULE
@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_are_as_accurate_as_pytorch(device, dtype, rule, chosen):
    """Would break if a rule's factors, the sign of an input or one of several coefficients were wrong."""
    check_relevance(*operands((9,), 45, 20, dtype, device), rule, chosen=chosen)
    check_relevance(*operands((2, 4), 40, 33, dtype, device, count=3), rule, True, chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20, 50, 80])
def test_what_launches_choose(device, dtype, rows):
    """Would break if the tiles of a size class computed something else."""
    inputs = operands((rows,), 140, 130, dtype, device)
    check_forward(*inputs[-2:])
    check_relevance(*inputs, RULES["gamma"])


@EACH_RULE
@pytest.mark.parametrize("edge", ["zeros", "negative zeros", "ones", "large", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_at_the_edges(device, dtype, edge, rule):
    """Would break if an output to which nothing contributes, or only one sign does, gave NaN."""
    assert edge in EDGES
    check_relevance(*operands((9,), 40, 20, dtype, device, edge=edge), rule, chosen=(SMALL, 1))


@CHOSEN
@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows apart"])
def test_strides(device, chosen, layout):
    """Would break if a stride were taken for that of a contiguous tensor."""
    inputs = [strided(t, layout) for t in operands((2, 9), 33, 20, torch.float32, device, 2)]
    check_forward(*inputs[-2:], chosen=chosen)
    check_relevance(*inputs, RULES["alpha-beta"], True, chosen)


@settings(max_examples=10)
@given(
    count=st.sampled_from([None, 1, 3]),
    shape=st.sampled_from([(), (1,), (17,), (2, 1, 9)]),
    out=st.integers(1, 40),
    into=st.integers(1, 40),
    parts=st.integers(1, 4),
    tiles=st.sampled_from([SMALL, SWAPPED]),
)
def test_any_shape(device, count, shape, out, into, parts, tiles):
    """Would break at a remainder in one dimension, or where a part of the reduction is empty."""
    inputs = operands(shape, out, into, torch.float32, device, count)
    check_forward(*inputs[-2:], values((out,), device=device), (tiles, parts))
    check_relevance(*inputs, RULES["alpha-beta, stabilised"], chosen=(tiles, parts))


@pytest.mark.parametrize("shape, out, into", [((0, 3), 5, 6), ((2,), 0, 6), ((2,), 5, 0)])
def test_empty(device, shape, out, into):
    """Would break if nothing were launched over, or an empty sum left memory as it was."""
    inputs = operands(shape, out, into, torch.float32, device)
    z, absolute = kernel.forward(*inputs[-2:], None, False)
    assert z.shape == absolute.shape == (*shape, out) and (z == 0).all() and (absolute == 0).all()
    found = kernel.relevance(*inputs, *RULES["gamma"], False, False)
    assert found.shape == (*shape, into) and (found == 0).all()


@pytest.mark.parametrize("rule", [Gamma(0.3, 0.1), Gamma(2.0), AlphaBeta(2, 1, 0.01), AlphaBeta(), ZPlus()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_derivative_of_the_op_is_the_rule(device, dtype, rule):
    """Would break if the op and the rule that the compiler assigns were two rules."""
    g, _, _, x, weight = operands((9,), 7, 5, dtype, device)
    bias = values((7,), dtype, device)
    strengths = (rule.gamma,) if isinstance(rule, Gamma) else (rule.alpha, rule.beta)
    name = "gamma" if isinstance(rule, Gamma) else "alpha_beta"
    x1 = x.clone().requires_grad_()
    z, absolute = ops.linear_split(x1, weight, bias, name, strengths, rule.epsilon)
    assert not absolute.requires_grad
    (found,) = torch.autograd.grad(z, x1, g)
    step = rule.linearize(Call(torch.ops.aten.linear.default, (x, weight, bias), {}, (0,)))
    (expected,) = step.pullback(g)
    tolerance = 64 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(z, step.output, rtol=0, atol=tolerance)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@EACH_RULE
def test_the_relevance_op_is_linear_in_coefficients(rule):
    """Would break if its own derivative were that of another map."""
    g, *others = operands((2, 3), 7, 5, torch.float64, "cpu", 2)
    for times_x in (False, True):
        assert torch.autograd.gradcheck(
            lambda g, t=times_x: ops.linear_split_relevance(g, *others, *rule, t), g.requires_grad_()
        )


def test_opcheck():
    """Would break if a schema, a fake result or a derivative were not what PyTorch takes it for."""
    g, *others, x, weight = operands((2, 3), 7, 5, torch.float64, "cpu", 2)
    rule = RULES["gamma"]
    torch.library.opcheck(ops.linear_split_relevance, (g.requires_grad_(), *others, x, weight, *rule))
    torch.library.opcheck(ops.linear_split, (x.requires_grad_(), weight, None, *rule))


def test_it_compiles_whole():
    """Would break if a graph broke at the op, or sizes of rows became constants."""

    def explain(g, x, weight):
        z, absolute = ops.linear_split(x, weight, None, *RULES["gamma"])
        return ops.linear_split_relevance(g, z, absolute, x, weight, *RULES["gamma"], True)

    compiled = torch.compile(explain, fullgraph=True, dynamic=True)
    # PyTorch's cache knows these ops by name and not by what they are made of.
    fresh = torch._inductor.config.patch(force_disable_caches=True)
    with torch._dynamo.config.patch(error_on_recompile=True), fresh:
        for rows in (3, 6):
            g, _, _, x, weight = operands((rows,), 7, 5, torch.float32, "cpu")
            torch.testing.assert_close(compiled(g, x, weight), explain(g, x, weight))


@pytest.mark.parametrize("rule, strengths", [("beta", [1.0]), ("gamma", [1.0, 2.0]), ("alpha_beta", [])])
def test_a_rule_that_there_is_not(rule, strengths):
    """Would break if a misspelt rule, or strengths that are not its own, computed anything."""
    with pytest.raises(ValueError, match="strengths: give one of"):
        ops.linear_split_relevance(*operands((2,), 3, 4, torch.float32, "cpu"), rule, strengths)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, ""),
        ({"weight": torch.zeros(3, 4, dtype=torch.bfloat16)}, "dtype of x"),
        ({"weight": torch.zeros(2, 3, 4)}, "W [out, in]"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, "float64"),
        ({"weight": torch.zeros(3, 5)}, "belong together"),
        ({"bias": torch.zeros(2)}, "belong together"),
        ({"results": (torch.zeros(2, 3), torch.zeros(1, 3))}, "belong together"),
        ({"g": torch.zeros(2, 4)}, "belong together"),
        ({"tf32": False}, "TensorFloat-32"),
    ],
)
def test_refusals(change, reason):
    """Would break if a kernel were launched on what it does not take, or the reason were lost."""
    if torch.cuda.is_available():
        pytest.skip("on a machine with a CUDA device, tensors on the CPU are refused as such")
    given = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "tf32": True}
    is_fit, why = ops.can_run(**(given | change))
    assert is_fit == (not reason) and reason in why

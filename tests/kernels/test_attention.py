"""Attention's kernels against float64, fxlrp's own rules, and PyTorch's own machinery."""

import math
from dataclasses import dataclass, replace

import pytest

pytest.importorskip("triton")

import interpreter
import torch
from common import DTYPES, MASKS, additive, assert_accurate, checked, double, strided, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxlrp.kernels import attention
from fxlrp.kernels.attention import reference, tiles
from fxlrp.kernels.attention.scoring import Scoring
from fxlrp.rules import AttentionRule, FrozenAttention, ops
from fxlrp.rules.base import Call

SHARES = (0.25, 0.25, 0.5)


@pytest.fixture(autouse=True)
def right_about_bfloat16():
    with interpreter.bfloat16():
        yield


@dataclass(frozen=True)
class Case:
    """A call: sizes, what lies between scores and softmax, and the rule."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 21
    keys: int = 37
    size: int = 16
    value_size: int = 16
    targets: int | None = None
    mask: str = ""
    dtype: torch.dtype = torch.float32
    sinks: bool = False
    causal: bool = False
    offset: int = 0
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    cap_gradient: bool = False
    epsilon: float = 0.0
    score_epsilon: float = 0.0
    shares: tuple[float, float, float] = SHARES
    layout: str = "contiguous"
    edge: str = "normal"

    @property
    def scoring(self):
        return self.causal, self.offset, self.window, self.scale, self.soft_cap

    def inputs(self, device):
        """q, k, v, G, mask, sinks."""
        lead = (self.targets,) if self.targets else ()

        def made(*shape):
            return strided(values(shape, self.dtype, device, self.edge), self.layout)

        q = made(self.batch, self.heads, self.queries, self.size)
        k = made(self.batch, self.kv_heads, self.keys, self.size)
        v = made(self.batch, self.kv_heads, self.keys, self.value_size)
        g = values((*lead, self.batch, self.heads, self.queries, self.value_size), self.dtype, device)
        return q, k, v, g, self._mask(device), values((self.heads,), device=device) if self.sinks else None

    def _mask(self, device):
        name, _, kind = self.mask.partition(", ")
        if not name:
            return None
        if name == "alibi":
            return -values((self.heads, 1, 1), device=device).abs() * torch.arange(self.keys, device=device)
        if name == "position bias":
            return values((1, self.heads, self.queries, self.keys), self.dtype, device)
        mask = MASKS[name](self.queries, self.keys).to(device)
        if name == "padded":
            mask = mask[:1].expand(self.batch, 1, 1, self.keys)
        least = {"added": -math.inf, "least": torch.finfo(self.dtype).min}
        return additive(mask, self.dtype, least[kind]) if kind else mask


def composed(case, q, k, v, g, mask, sinks):
    """out, lse, coefficients of q, k and v, and those of v when frozen: step by step, in the inputs' dtype.

    Each step's derivative is autograd's; stabilisers divide as in the paper. Rows in which all is masked get
    nothing, by hand.
    """
    group = case.heads // case.kv_heads
    places = torch.arange(case.queries, device=q.device)[:, None] + case.offset
    ahead = torch.arange(case.keys, device=q.device) - places
    hidden = (ahead > 0) & case.causal
    if case.window is not None:
        hidden |= ahead.abs() >= case.window
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    raw = q @ k.repeat_interleave(group, 1).mT
    scale = case.size**-0.5 if case.scale is None else case.scale
    scaled = raw.detach().to(wide) * scale
    x = scaled / (case.soft_cap or 1.0)
    s = torch.tanh(x) * case.soft_cap if case.soft_cap else scaled
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(wide)
    s = s.masked_fill(hidden, -math.inf)
    logits = s
    if sinks is not None:
        logits = torch.cat([s, sinks.to(wide)[:, None, None].expand(*s.shape[:-1], 1)], -1)
    lse = logits.logsumexp(-1)
    weights = (s - lse[..., None]).exp().masked_fill(lse[..., None] == -math.inf, 0.0)
    weights = weights.to(q.dtype).requires_grad_()
    out = weights @ v.repeat_interleave(group, 1)

    found = []
    for one in g if case.targets else [g]:
        z = out.detach().to(wide)
        damped = one
        if case.epsilon:
            damped = (one * z / (z + case.epsilon * torch.where(z < 0, -1.0, 1.0))).to(q.dtype)
        of_weights, of_v = torch.autograd.grad(out, (weights, v), damped, retain_graph=True)
        p, d = weights.detach().to(wide), of_weights.to(wide)
        of_s = p * (d - (p * d).sum(-1, keepdim=True))
        if case.soft_cap:
            of_s = of_s * (
                1 - torch.tanh(x) ** 2 if case.cap_gradient else torch.where(x == 0, 1.0, torch.tanh(x) / x)
            )
        r = raw.detach().to(wide)
        if case.score_epsilon:
            of_s = of_s * r / (r + case.score_epsilon * torch.where(r < 0, -1.0, 1.0))
        of_raw = (of_s * scale).to(q.dtype)
        of_q, of_k = torch.autograd.grad(raw, (q, k), of_raw, retain_graph=True)
        (frozen,) = torch.autograd.grad(out, v, one, retain_graph=True)
        found.append([share * c for share, c in zip(case.shares, (of_q, of_k, of_v), strict=True)] + [frozen])
    coefficients = [torch.stack(c) if case.targets else c[0] for c in zip(*found, strict=True)]
    return [out.detach(), lse, *coefficients]


def computed(case, q, k, v, g, mask, sinks):
    """The same from the ops."""
    out, lse = attention.attention_forward(q, k, v, mask, sinks, *case.scoring)
    coefficients = attention.attention_relevance(
        q, k, v, out, lse, g, case.shares, mask, *case.scoring, case.cap_gradient, case.epsilon,
        case.score_epsilon,
    )  # fmt: skip
    frozen = attention.attention_frozen_relevance(q, k, lse, g, mask, *case.scoring)
    return [out, lse, *coefficients, frozen]


def in_float32(case, q, k, v, g, mask, sinks):
    """The same from the reference in PyTorch, which takes P from lse and delta from out as the kernels do."""
    scoring = Scoring.of(case.size, case.scale, *case.scoring[:3], case.soft_cap, case.cap_gradient)
    out, lse = reference.forward(q, k, v, mask, sinks, scoring)
    rule = case.epsilon, case.score_epsilon, case.shares
    coefficients = reference.relevance(q, k, v, out, lse, g, mask, scoring, *rule)
    return [out, lse, *coefficients, reference.frozen_relevance(q, k, lse, g, mask, scoring)]


NAMES = ("out", "lse", "q", "k", "v", "frozen v")


def cancelling(case, q, k, v, g, mask, sinks):
    """For plain cases, the magnitudes that coefficients of q and k are sums of, in float64."""
    scoring = Scoring.of(case.size, case.scale, *case.scoring[:3], None)
    out, lse = reference.forward(q, k, v, mask, sinks, scoring)
    weights = reference._Scores.of(q, k, mask, scoring).weights(lse)
    s = weights * (g.abs() @ v.abs().mT + (g * out).abs().sum(-1, keepdim=True)) * scoring.scale
    return {"q": s @ k.abs() * case.shares[0], "k": s.mT @ q.abs() * case.shares[1]}


def check(case, device, terms=None):
    """The ops are as accurate as the steps are in the same precision, and touch nothing else.

    `terms`: of a case's inputs, by result what it is a sum of.
    """
    inputs = case.inputs(device)
    *plain, mask, sinks = inputs
    with checked(*plain) as copies:
        found = computed(case, *copies, mask, sinks)
    # In float32 the same sums in the same order of steps; half precision rounds where plain PyTorch rounds.
    same = (in_float32 if case.dtype == torch.float32 else composed)(case, *inputs)
    exact = composed(case, *double(*inputs))
    sizes = {} if terms is None else terms(case, *double(*inputs))
    active = (True, True, *(bool(s) for s in case.shares), True)
    for name, f, s, e, wanted in zip(NAMES, found, same, exact, active, strict=True):
        if wanted:
            assert_accurate(f, s, e, name=name, terms=sizes.get(name))
        else:
            assert f.shape == (0,)


#: Together, each feature with most others at least once; not each with each.
CASES = [
    Case(),
    Case(causal=True, batch=2, heads=4, targets=3, queries=37),
    Case(causal=True, offset=16, window=9, heads=4, kv_heads=1, epsilon=0.1, value_size=24),
    Case(window=6, offset=8, mask="padded", score_epsilon=0.3, size=24, targets=2),
    Case(mask="padded", batch=2, sinks=True, epsilon=0.2, score_epsilon=0.2, shares=(0.0, 0.5, 0.5)),
    Case(mask="alibi", causal=True, heads=4, kv_heads=2, soft_cap=2.0, shares=(0.5, 0.0, 0.5)),
    Case(mask="position bias", sinks=True, size=40, value_size=8, layout="rows apart"),
    Case(mask="random", causal=True, offset=-5, targets=2, soft_cap=3.0, cap_gradient=True),
    Case(mask="random, added", window=20, scale=0.7, shares=(0.0, 0.0, 1.0), epsilon=0.1),
    Case(mask="dead rows", heads=4, kv_heads=2, epsilon=0.5, layout="transposed"),
    Case(mask="dead rows, added", sinks=True, score_epsilon=0.1, shares=(1.0, 1.0, 1.0)),
    Case(mask="none", targets=2),
    Case(queries=1, keys=33, causal=True, offset=32, heads=4, kv_heads=1, score_epsilon=0.2),
    Case(queries=40, keys=3, mask="alibi", sinks=True, epsilon=0.1),
    Case(edge="zeros", epsilon=0.1, score_epsilon=0.1),
    Case(edge="subnormal", causal=True, epsilon=1e-3),
    Case(edge="mixed", sinks=True, soft_cap=30.0, targets=2),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_results_are_as_accurate_as_the_steps(device, case):
    """Would break if a mask, a remainder, a group of heads, a stabiliser or a target went wrong."""
    check(case, device)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("number", [1, 4, 6])
def test_half_precision_is_as_accurate_as_the_steps(device, dtype, number):
    """Would break if a sum were kept in half precision, or a value rounded twice."""
    check(replace(CASES[number], dtype=dtype), device)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(64, torch.bfloat16), (128, torch.float32), (128, torch.bfloat16), (256, torch.bfloat16)],
    ids=str,
)
def test_heads_as_models_have_them_are_as_accurate_as_the_steps(device, size, dtype):
    """Would break above 128, where keys' and values' coefficients are launched apart, or at a whole tile."""
    sizes = {"queries": 17, "keys": 35, "causal": True, "offset": 18, "size": size, "value_size": size}
    check(Case(heads=2, kv_heads=1, targets=2, epsilon=0.1, dtype=dtype, **sizes), device)


def test_sizes_that_do_not_belong_together_are_never_launched(device):
    """Would break if a kernel read past what a shorter tensor holds: the steps refuse such sizes."""
    q, k, v, g, *_ = Case().inputs(device)
    out, lse = attention.attention_forward(q, k, v)
    with pytest.raises(RuntimeError, match="size"):
        attention.attention_forward(q, k[:, :, :-1], v)
    with pytest.raises(RuntimeError, match="size"):
        attention.attention_relevance(q, k, v, out, lse[:, :, :-1], g, SHARES)
    with pytest.raises(RuntimeError, match="size"):
        attention.attention_frozen_relevance(q, k, lse, g[:, :, :-1])


@settings(max_examples=6)
@given(
    queries=st.integers(1, 34),
    keys=st.integers(1, 34),
    size=st.integers(1, 33),
    value_size=st.integers(1, 33),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
    offset=st.integers(-20, 40),
)
def test_any_shape_is_as_accurate_as_the_steps(device, **sizes):
    """Would break if some length, head size, window or offset met a bound that is off by one."""
    check(Case(heads=1, kv_heads=1, **sizes), device, cancelling)


def test_masked_rows_hold_nothing(device):
    """Would break if a row without keys gave NaN, or sent relevance anywhere."""
    case = Case(mask="none", heads=1, kv_heads=1)
    out, lse, *coefficients = computed(case, *case.inputs(device))
    assert (out == 0).all() and (lse == -math.inf).all()
    assert all((c == 0).all() for c in coefficients)


def test_the_least_float_masks_as_in_pytorch(device):
    """Would break if a row of the least float were not uniform, or its relevance not that of a masked row."""
    case = Case(mask="none, least", heads=1, kv_heads=1)
    q, k, v, _, mask, _ = inputs = case.inputs(device)
    out, _, *coefficients = computed(case, *inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    assert all((c == 0).all() for c in coefficients)


def test_an_operand_without_a_share_changes_no_other(device):
    """Would break if a coefficient depended on which others are asked for: each is the same bit for bit."""
    case = Case(causal=True)
    inputs = case.inputs(device)
    whole = computed(case, *inputs)[2:5]
    for i in range(3):
        alone = computed(replace(case, shares=tuple(s * (i == j) for j, s in enumerate(SHARES))), *inputs)
        assert torch.equal(alone[2 + i], whole[i])


def test_targets_together_are_targets_alone(device):
    """Would break if a target's coefficient took part in another's; odd numbers leave a place empty."""
    case = Case(targets=3, causal=True, epsilon=0.1)
    q, k, v, g, mask, sinks = case.inputs(device)
    together = computed(case, q, k, v, g, mask, sinks)[2:]
    for i in range(3):
        alone = computed(replace(case, targets=None), q, k, v, g[i], mask, sinks)[2:]
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sizes", [{"queries": 0}, {"keys": 0}, {"batch": 0}], ids=str)
def test_empty_operands_need_no_launch(device, sizes):
    """Would break if a grid of 0 programs were launched, or what no query reaches were left as it was."""
    case = replace(Case(heads=1, kv_heads=1), **sizes)
    q, k, v, g, *rest = case.inputs(device)
    out, lse, of_q, of_k, of_v, frozen = computed(case, q, k, v, g, *rest)
    assert (out.shape, lse.shape, of_q.shape, of_k.shape) == (g.shape, g.shape[:-1], q.shape, k.shape)
    assert all((x == 0).all() for x in (out, of_q, of_k, of_v, frozen))


# -- the rules -----------------------------------------------------------------------------------------------


def rule_call(dtype=torch.float64, mask="padded", active=(0, 1, 2)):
    case = Case(batch=2, heads=4, dtype=dtype, mask=mask, value_size=8)
    q, k, v, g, mask, _ = case.inputs("cpu")
    return Call(ops.attention, (q, k, v, mask), {"enable_gqa": True}, active), g


RULES = [
    (AttentionRule(), {}),
    (AttentionRule(epsilon=0.1, score_epsilon=0.3), {"epsilon": 0.1, "score_epsilon": 0.3}),
    (FrozenAttention(), {"frozen": True}),
]


@pytest.mark.parametrize(("rule", "options"), RULES, ids=lambda x: str(x)[:30])
@pytest.mark.parametrize("active", [(0, 1, 2), (2,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_forwards_derivative_is_the_rule(rule, options, active, dtype):
    """Would break if an op used by itself shared relevance out otherwise than the rule does."""
    call, g = rule_call(dtype, active=active)
    leaves = [x.requires_grad_(i in active) if i < 3 else x for i, x in enumerate(call.args)]
    out, _ = attention.attention_forward(*leaves, **options)
    wanted = [leaves[i] for i in active]
    found = torch.autograd.grad(out, wanted, g, allow_unused=True) if out.requires_grad else []
    expected = rule.linearize(call).pullback(g)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None:
            torch.testing.assert_close(f, e)


@pytest.mark.parametrize(("rule", "options"), RULES[:2], ids=lambda x: str(x)[:30])
def test_many_targets_are_the_rules(rule, options):
    """Would break if the leading dimension of coefficients meant something else than in the rules."""
    call, g = rule_call()
    g = torch.stack([g, -2 * g, g.flip(-1)])
    expected = rule.linearize_many(call).pullback(g)
    q, k, v, mask = call.args
    out, lse = attention.attention_forward(q, k, v, mask)
    found = attention.attention_relevance(q, k, v, out, lse, g, SHARES, mask, **options)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


# -- PyTorch's machinery -------------------------------------------------------------------------------------


#: Poisoned memory begins elsewhere than a fake tensor's, so that real kernels are not compared with those.
KERNEL_CHECKS = ("test_schema", "test_autograd_registration")


@pytest.mark.parametrize("targets", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["interpreted", "reference"])
def test_ops_keep_pytorchs_contract(dtype, targets):
    """Would break if a fake shape, stride or dtype differed from the real one, or an input came back."""
    case = Case(targets=targets, heads=1, kv_heads=1, dtype=dtype)
    q, k, v, g, *_ = case.inputs("cpu")
    out, lse = attention.attention_forward(q, k, v)
    options = {"test_utils": KERNEL_CHECKS} if dtype == torch.float32 else {}
    torch.library.opcheck(attention.attention_forward, (q.clone().requires_grad_(), k, v), **options)
    shares = [0.5, 0.0, 0.5]
    torch.library.opcheck(attention.attention_relevance, (q, k, v, out, lse, g, shares), **options)
    torch.library.opcheck(attention.attention_frozen_relevance, (q, k, lse, g), **options)


def test_ops_compile_whole():
    """Would break if an op could not be traced with sizes as symbols, or computed something else compiled."""
    case = Case(mask="padded", sinks=True, causal=True)

    def both(q, k, v, g, mask, sinks):
        return computed(case, q, k, v, g, mask, sinks)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for keys in (37, 50):
        inputs = replace(case, keys=keys, dtype=torch.float64).inputs("cpu")
        for found, expected in zip(compiled(*inputs), both(*inputs), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 300}, "1 to 128"),
        ({"heads": 3, "kv_heads": 2}, "no multiple"),
        ({"dtype": torch.float64}, "float64"),
    ],
    ids=str,
)
def test_what_kernels_do_not_take_has_a_reason(change, reason):
    """Would break if a call that cannot run were claimed, or refused without saying why."""
    q, k, v, *_ = replace(Case(), **change).inputs("cpu")
    ok, why = attention.can_run(q, k, v)
    assert not ok and reason in why


def test_masks_and_temperatures_that_do_not_fit_have_a_reason():
    """Would break if a mask that does not broadcast, or a rule that has no kernel, were claimed."""
    q, k, v, *_ = Case().inputs("cpu")
    assert attention.can_run(q, k, v, torch.ones(2, 1, 21, 37, dtype=torch.bool)[:1]) == (True, "")
    assert "broadcast" in attention.can_run(q, k, v, torch.ones(21, 36))[1]
    assert "boolean or added" in attention.can_run(q, k, v, torch.ones(37, dtype=torch.int64))[1]
    assert "sinks" in attention.can_run(q, k, v, None, torch.ones(3))[1]
    assert "temperature" in attention.can_run(q, k, v, temperature=2.0)[1]
    assert "agree" in attention.can_run(q, k[:, :, :-1], v)[1]


def test_symbolic_lengths_are_not_decided_on():
    """Would break if asking put a guard on a size that changes from call to call."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    env = ShapeEnv()
    dynamic = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    )
    with FakeTensorMode(shape_env=env) as mode:
        q, mask = (
            mode.from_tensor(torch.empty(shape), symbolic_context=dynamic)
            for shape in ((3, 2, 21, 16), (3, 1, 21, 1))
        )
        q = q.clone()
        assert attention.can_run(q, q, q) == (True, "")
        attention.can_run(q, q, q, mask)
    assert not env.guards


# -- tables --------------------------------------------------------------------------------------------------


def test_tables_have_tiles_for_every_head():
    """Would break if a launch found no tiles, or ones that products or the padding of sums cannot have."""
    for kernel in tiles.KERNELS:
        for kind in tiles.TARGETS:
            for dtype in DTYPES:
                for size in (1, 32, 64, 80, 128, 192, 256)[: 7 if dtype.itemsize == 2 else 5]:
                    for laden in (False, True):
                        for targets in (1, 8):
                            cut = tiles.choose(kernel, kind, dtype, size, targets, laden)
                            assert cut.queries in (16, 32, 64, 128) and cut.keys in (16, 32, 64, 128)
                            assert 1 <= cut.targets <= targets

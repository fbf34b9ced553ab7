"""Capture: what the model computes, functional, on the model's own weights, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch.nn import functional as F

import fxlrp
from fxlrp.compiler.capture import DYNAMIC, STATIC, TRACE, capture
from fxlrp.compiler.faithful import compare, run_model
from fxlrp.compiler.inputs import bind
from fxlrp.compiler.verify import verify_functional


class Block(nn.Module):
    """A linear layer around which tests put what is hard to capture."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 3)
        nn.init.normal_(self.norm.bias)


class NoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            scale = self.norm(h).sigmoid()
        return self.last(h * scale)


class CastInNoGrad(Block):
    """Casts without effect return the tensor itself, which keeps its gradient outside of the region."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            scale = self.norm(h.to(self.norm.weight.dtype).contiguous()).sigmoid()
        return self.last(h * scale)


class CastInNoGradRetraced(CastInNoGrad):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :3].copy_(x[:, :3])
        return super().forward(x + y)


class CopyInNoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            same = h.to(h.dtype, copy=True)
        return self.last(h * self.norm(same).sigmoid())


class Detached(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h * self.norm(h).sigmoid().detach())


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h += self.norm(x)
        h.mul_(2.0).relu_()
        return self.last(h)


class MutatedView(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h[:, :2] *= 3.0
        h[:, 4] = 0.5
        h[:, 5].copy_(x[:, 0])
        return self.last(h)


class LaidOutAnew(Block):
    """Retraced, the reshape is a view, which relies on the strides that the cast gives."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h[:, :2] *= 3.0
        h = h.view(-1, 1, 3, 2).permute(0, 3, 1, 2)  # channels last, else the cast does nothing
        return self.last(h.to(h.dtype, memory_format=torch.contiguous_format).reshape(-1, 6))


class AliasedLater(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        view = h.view(-1, 2, 3)
        h.add_(1.0)
        return self.last(view.reshape(-1, 6))


class InPlaceInNoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            c = h.clone()
            c[:, :3].zero_()
            c.clamp_(min=0)
        return self.last(h + c)


class Autocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.first(x)
        return self.last(h.float())


class BranchesOnData(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h * 2.0 if bool((x.sum() > 0).item()) else h - self.norm(x)
        return self.last(h)


class RepeatedTensor(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(x * x + torch.cat([x, x], -1)[:, :6] * x)


MODELS = [
    CastInNoGrad,
    CastInNoGradRetraced,
    CopyInNoGrad,
    NoGrad,
    InPlace,
    MutatedView,
    LaidOutAnew,
    AliasedLater,
    InPlaceInNoGrad,
    Autocast,
    RepeatedTensor,
    BranchesOnData,
]


def autograd_reference(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).max(-1).values.sum(), x)[0] * x.detach()


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_captured_graph_is_functional_and_equals_the_model(kind: type[nn.Module]) -> None:
    """Would break: in-place ops left in the graph, regions inlined wrongly, views apart from their base."""
    model, x = kind().eval(), torch.randn(4, 6)
    bound = bind(model, (x,), {})
    captured = capture(model, bound)
    verify_functional(captured.graph)
    assert compare(captured.graph, bound, run_model(model, bound)) is None


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_gradient_composite_equals_autograd(kind: type[nn.Module]) -> None:
    """Would break: a stop-gradient lost when its region is inlined, a mutation that drops its gradient."""
    model, x = kind().eval(), torch.randn(4, 6)
    explanation = fxlrp.lrp_compile(model, "gradient")(x)
    tolerance = 2e-2 if kind is Autocast else 1e-5
    torch.testing.assert_close(
        explanation.relevance, autograd_reference(model, x), rtol=tolerance, atol=tolerance
    )
    assert explanation.ledger.residual < (1e-2 if kind is Autocast else 1e-4)


def test_nothing_flows_through_a_no_grad_region() -> None:
    """A no-grad region and detach mean the same."""
    model, other, x = NoGrad().eval(), Detached().eval(), torch.randn(4, 6)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        fxlrp.lrp_compile(model)(x).relevance, fxlrp.lrp_compile(other)(x).relevance, rtol=1e-5, atol=1e-6
    )


def test_the_ladder_names_its_step() -> None:
    model, x = Block().eval(), torch.randn(4, 6)
    model.forward = lambda x: model.last(model.norm(model.first(x)))
    assert capture(model, bind(model, (x,), {})).method == DYNAMIC
    assert capture(model, bind(model, (x,), {}), dynamic=False).method == STATIC
    branching = BranchesOnData().eval()
    captured = capture(branching, bind(branching, (x,), {}))
    assert captured.method == TRACE
    assert any("branches on its input's values" in note for note in captured.notes)


def test_a_trace_of_one_input_is_not_used_for_another() -> None:
    """Would break: the first input's branch taken for all."""
    model = BranchesOnData().eval()
    explainer = fxlrp.lrp_compile(model, "gradient")
    for x in (torch.ones(2, 6), -torch.ones(2, 6), torch.ones(2, 6) * 2):
        torch.testing.assert_close(explainer(x).relevance, autograd_reference(model, x), rtol=1e-5, atol=1e-6)
    assert "trace of this input" in str(explainer.plan)


def test_ambient_autocast_is_part_of_the_graph() -> None:
    """Would break: the casts of a region around the call left out, or kept for calls outside of it."""
    model, x = Block().eval(), torch.randn(4, 6)
    model.forward = lambda x: model.last(F.relu(model.first(x)))
    explainer = fxlrp.lrp_compile(model)
    outside = explainer(x).value
    with torch.autocast("cpu", torch.bfloat16):
        inside = explainer(x).value
        expected = model(x).max(-1).values
    torch.testing.assert_close(inside, expected)
    assert not torch.equal(inside.float(), outside)
    torch.testing.assert_close(explainer(x).value, outside)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_of_the_caller_do_not_matter(context: type) -> None:
    model, x = Block().eval(), torch.randn(4, 6)
    model.forward = lambda x: model.last(model.norm(model.first(x)))
    expected = fxlrp.lrp_compile(model)(x)
    with context():
        found = fxlrp.lrp_compile(model)(x.clone())
        residual = found.ledger.residual
    torch.testing.assert_close(found.relevance.clone(), expected.relevance)
    assert residual < 1e-5


def test_the_model_is_left_as_it_was() -> None:
    """No hooks, no patches, no copies, no gradients, no changed modes."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    model.train()
    model[1].eval()
    before = {
        name: (value.clone(), value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()
    }
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    explainer = fxlrp.lrp_compile(model)
    explanation = explainer(torch.randn(4, 6))
    assert explanation.ledger.residual < 1e-4
    for name, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(value, before[name][0])
        assert value.data_ptr() == before[name][1]
        assert value.grad is None
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert (model.training, model[1].training) == (True, False)
    assert attributes == {name: sorted(vars(module)) for name, module in model.named_modules()}
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


def test_weights_are_shared_and_never_copied() -> None:
    model, x = Block().eval(), torch.randn(4, 6)
    model.forward = lambda x: model.last(model.norm(model.first(x)))
    explainer = fxlrp.lrp_compile(model)
    first = explainer(x).value
    for graph in (explainer.rule_graph, explainer.relevance_graph):
        pointers = {t.data_ptr() for t in (*graph.parameters(), *graph.buffers())}
        assert pointers <= {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        model.last.weight.mul_(2.0)
    assert not torch.allclose(explainer(x).value, first), "an in-place update must be seen"


def test_a_replaced_weight_or_another_dtype_is_traced_anew() -> None:
    model, x = Block().eval(), torch.randn(4, 6)
    model.forward = lambda x: model.last(model.norm(model.first(x)))
    explainer = fxlrp.lrp_compile(model)
    explainer(x)
    model.last.weight = nn.Parameter(torch.randn(3, 6))
    torch.testing.assert_close(explainer(x).value, model(x).max(-1).values)
    model.double()
    torch.testing.assert_close(explainer(x.double()).value, model(x.double()).max(-1).values)


def test_one_trace_serves_all_batch_sizes_and_lengths() -> None:
    """Would break: sizes baked into the relevance graph."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.block = (
                nn.Embedding(11, 8),
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            )
            self.head = nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.block(self.embedding(ids)).mean(1))

    model = Tokens().eval()
    explainer = fxlrp.lrp_compile(model)
    for batch, length in ((2, 5), (3, 9), (1, 4), (4, 1), (1, 1)):
        ids = torch.randint(0, 11, (batch, length))
        explanation = explainer(ids)
        torch.testing.assert_close(explanation.value, model(ids).max(-1).values)
        alone = fxlrp.lrp_compile(model, dynamic=False)(ids)
        torch.testing.assert_close(explanation.relevance, alone.relevance, rtol=1e-4, atol=1e-6)
    assert sum(map(len, explainer._traces.values())) == 1


def test_failed_attempts_are_told_by_the_plan_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """Would break: PyTorch's tracebacks and graphs on the terminal for a model that is then captured."""

    class Branches(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(torch.relu(h) if h.sum() > 0 else torch.tanh(h)).sum(1)

    explainer = fxlrp.lrp_compile(Branches().eval(), backend="eager")
    explainer(torch.randn(2, 5, 6))
    assert any("not captured by dynamic export" in note for note in explainer.plan.notes)
    assert capfd.readouterr().err == ""


class Chunked(Block):
    """Pads the sequence to whole chunks, as linear attention in chunks does."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = F.pad(h, (0, 0, 0, (8 - h.shape[1] % 8) % 8))
        return self.last(h.unflatten(1, (-1, 8)).cumsum(2).sum(1)).sum(1)


def test_padding_takes_all_lengths() -> None:
    """Would break: padding or its derivative as PyTorch traces it by itself, which fixes the length."""
    model = Chunked().eval()
    explainer = fxlrp.lrp_compile(model, "gradient", backend="eager")
    for length in (5, 7):
        x = torch.randn(2, length, 6)
        torch.testing.assert_close(explainer(x).relevance, autograd_reference(model, x))
        assert explainer.plan.notes == (f"captured by {DYNAMIC}",)
    assert sum(map(len, explainer._traces.values())) == 1


def test_a_shape_that_the_trace_does_not_admit_is_traced_anew() -> None:
    """A model that specialises on its length: retrace, not a wrong answer."""

    class Reshaping(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if x.shape[0] % 2 == 0:
                h = h.view(2, -1, 6).flip(0).reshape(-1, 6)
            return self.last(h)

    model = Reshaping().eval()
    explainer = fxlrp.lrp_compile(model, "gradient")
    for rows in (4, 3, 6, 5, 4):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(explainer(x).relevance, autograd_reference(model, x), rtol=1e-4, atol=1e-6)


class Branching(nn.Module):
    """``torch.cond`` on the data, inside a ``while_loop`` where ``loops``."""

    def __init__(self, loops: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.loops = loops

    def left_branch(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(x)) + 0

    def right_branch(self, x: Tensor) -> Tensor:
        return self.right(x) * 2

    def step(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.left_branch, self.right_branch, (x,))

    @staticmethod
    def goes_on(n: Tensor, x: Tensor) -> Tensor:
        return x.abs().sum() < 500

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if self.loops:
            n = torch.zeros(1)
            _, x = while_loop(self.goes_on, lambda n, x: (n + 1, 2 * x + self.left_branch(x)), (n, x))
        return self.head(self.step(x).mean(1))

    def in_python(self, x: Tensor) -> Tensor:
        """The forward from the embeddings on, with Python's own branches and loops."""

        def step(x: Tensor) -> Tensor:
            return self.left_branch(x) if x.sum() > 0 else self.right_branch(x)

        n = torch.zeros(1)
        while self.loops and self.goes_on(n, x):
            n, x = n + 1, 2 * x + self.left_branch(x)
        return self.head(step(x).mean(1))


@pytest.mark.parametrize("loops", [False, True])
def test_control_flow_is_followed_as_the_data_lead(loops: bool) -> None:
    """Breaks if a region is left in the graph, or another branch is explained than was taken."""
    torch.manual_seed(0)
    model = Branching(loops).eval()
    explainer = fxlrp.lrp_compile(model, "gradient")
    taken = set()
    for seed in range(4):
        ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(seed))
        taken.add(bool(model.embedding(ids).sum() > 0))
        embedded = model.embedding(ids).detach().requires_grad_(True)
        score = model.in_python(embedded).max(-1).values.sum()
        (gradient,) = torch.autograd.grad(score, embedded)
        found = explainer(ids)
        torch.testing.assert_close(found.relevance, (embedded * gradient).sum(-1).detach())
        assert found.ledger.residual < 1e-5
    assert taken == {True, False}
    assert "trace of this input" in str(explainer.plan)


class Straight(torch.autograd.Function):
    """Rounds, and passes gradients as if it did not; ``honest``: a cube with its own derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, honest: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.honest = honest
        return x**3 if honest else torch.round(x) + x * 0

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2 if ctx.honest else gradient, None


class WithFunction(Block):
    def __init__(self, honest: bool) -> None:
        super().__init__()
        self.honest = honest

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Straight.apply(self.first(x), self.honest))


def test_a_function_with_another_backward_is_refused_and_one_with_its_derivative_is_not() -> None:
    """Would break: a straight-through estimator explained as the derivative of its forward, silently."""
    x = torch.randn(4, 6)
    assert fxlrp.lrp_compile(WithFunction(True).eval(), "gradient")(x).ledger.residual < 1e-5
    with pytest.raises(fxlrp.CaptureError, match=r"autograd\.Function Straight"):
        fxlrp.lrp_compile(WithFunction(False).eval(), "gradient")(x)


class Experts(Block):
    """A loop over the experts that were chosen, each on the rows that chose it."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        chosen = h.argmax(-1)
        out = torch.zeros_like(h)
        for expert in torch.unique(chosen):
            (rows,) = torch.where(chosen == expert)
            scaled = self.norm(h[rows]) * (expert + 1)
            out = out.index_add(0, rows, scaled)
        out[chosen == 0] = out[chosen == 0] * 2
        return self.last(out + torch.masked_select(h, h > 0).sum())


def test_what_the_data_choose_is_constant_in_a_trace() -> None:
    """Would break: sizes that depend on data left in the graph, or fixed in one that serves other inputs."""
    torch.manual_seed(0)
    model = Experts().eval()
    explainer = fxlrp.lrp_compile(model, "gradient")
    for _ in range(2):
        x = torch.randn(5, 6)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).max(-1).values.sum(), leaf)
        torch.testing.assert_close(explainer(x).relevance, x * gradient)
    assert "trace of this input" in str(explainer.plan)


class Grid(Block):
    """Reads a grid whose sides are data, and normalises four neighbours as one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(24), nn.Linear(24, 3)

    def forward(self, x: Tensor, sides: Tensor) -> Tensor:
        height, width = sides
        h = torch.tanh(self.first(x))[:, : height * width].reshape(2, height, width, 6)
        height, width = h.shape[1:3]
        pairs = h.reshape(2, height, width // 2, 12).permute(0, 2, 1, 3)
        return self.last(self.norm(pairs.reshape(2, width // 2, height // 2, 24).permute(0, 2, 1, 3))).sum(
            (1, 2)
        )


def test_a_derivative_that_takes_no_sizes_from_data_is_taken_of_a_trace() -> None:
    """Would break: a tracer's error where the export held but a pullback wants to know the sizes."""
    model, x = Grid().eval(), torch.randn(2, 8, 6)
    explainer = fxlrp.lrp_compile(model, "gradient")
    for sides in (torch.tensor([2, 4]), torch.tensor([2, 2])):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf, sides).max(-1).values.sum(), leaf)
        torch.testing.assert_close(explainer(x, sides).relevance, x * gradient)
    assert "not built for all values" in str(explainer.plan)
    (traces,) = explainer._traces.values()
    assert len(traces) == 1
    with pytest.raises(fxlrp.CaptureError, match="a trace of that very input"):
        explainer._compiled((x, sides), {}, None)  # what torch.compile of a caller inlines


class Ragged(Block):
    """Splits by lengths that are data, and asks whether it is traced."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "counter":
            self.calls = getattr(self, "calls", 0) + 1
            h = h * self.calls
        return self.last(h)


def test_a_model_that_cannot_be_captured_is_told_why() -> None:
    """Would break: a bare list of tracer errors."""
    with pytest.raises(fxlrp.CaptureError) as caught:
        fxlrp.lrp_compile(Ragged("counter").eval())(torch.randn(4, 6))
    assert "because of an output that is not the model's" in str(caught.value)
    assert "keeps state between calls" in str(caught.value)


@torch.library.custom_op("fxlrp_tests::untraceable", mutates_args=())
def untraceable(x: Tensor) -> Tensor:
    return x * 2


class Untraceable(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(untraceable(self.first(x)))


def test_an_op_that_cannot_be_traced_is_named_with_its_line() -> None:
    """Would break: the model's own line lost, the class of the cause unknown."""
    with pytest.raises(fxlrp.CaptureError) as caught:
        fxlrp.lrp_compile(Untraceable().eval())(torch.randn(4, 6))
    message = str(caught.value)
    assert "return self.last(untraceable(self.first(x)))" in message
    assert "an op that PyTorch cannot trace" in message
    assert "register_fake" in message

"""The ops over rows as PyTorch sees them: schemas, fake results, derivatives, compilation."""

import pytest
import torch
from common import values

from fxlrp.kernels import gate, norm, softmax

X, G, PACKED = (3, 70), (2, 3, 70), (3, 140)


@pytest.fixture(autouse=True)
def poisoned():
    """Not here: an allocation between canaries starts somewhere, and PyTorch compares where."""


def tensors(device, *shapes, requires_grad=()):
    made = [values(shape, torch.float32, device) for shape in shapes]
    return [t.requires_grad_(i in requires_grad) for i, t in enumerate(made)]


def samples(device):
    """Every op with arguments; what requires a gradient is what the op has a derivative for."""
    x, residual = tensors(device, X, X, requires_grad=(0, 1))
    g, added = tensors(device, G, G, requires_grad=(0, 1))
    plain, other, weight, bias, rstd = tensors(device, X, X, (70,), (70,), (3, 1))
    packed, plain_packed = tensors(device, PACKED, PACKED, requires_grad=(0,))
    return {
        "softmax": (softmax.softmax, (x, plain < 1, 0.5, None)),
        "softmax in another dtype": (softmax.softmax, (x.mT, other.mT, 0.5, torch.float16)),
        "softmax relevance": (softmax.softmax_relevance, (g, plain.softmax(-1), 0.5)),
        "norm": (norm.norm, (x, weight, bias, 1e-5, 1.0, True)),
        "add norm": (norm.add_norm, (x, residual, weight, None, 1e-5)),
        "norm relevance": (norm.norm_relevance, (g, rstd, weight, added, 0.5, 1.0, True)),
        "norm relevance alone": (norm.norm_relevance, (g, rstd)),
        "activation": (gate.activation, (x, "gelu")),
        "activation relevance": (gate.activation_relevance, (g, plain, "mish")),
        "gate": (gate.gate, (x, residual, "silu")),
        "gate relevance": (gate.gate_relevance, (g, plain, other, "silu", 0.25, 0.75)),
        "packed gate": (gate.packed_gate, (packed, "gelu_tanh", False)),
        "packed gate relevance": (gate.packed_gate_relevance, (g, plain_packed, "relu", False, 0.25, 0.75)),
    }


NAMES = list(samples("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_ops_obey_pytorch(device, name):
    """Would break if schema, fake result, autograd or tracing with symbols were not as the op runs."""
    op, args = samples(device)[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", [n for n in NAMES if "relevance" in n])
def test_relevance_is_its_own_transposes_transpose(device, name):
    """Would break if the derivative of a map of G, which pushes tangents forward, were not its transpose."""
    op, (g, *args) = samples(device)[name]
    outputs = op(g, *args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    probes = [values(tuple(z.shape), torch.float32, device) for z in outputs]
    (back,) = torch.autograd.grad(outputs, g, probes)
    zero = op(torch.zeros_like(g), *args)
    zero = zero if isinstance(zero, tuple) else (zero,)
    mapped = sum((u * (z - o)).sum() for u, z, o in zip(probes, outputs, zero, strict=True))
    torch.testing.assert_close((back * g).sum(), mapped, rtol=1e-4, atol=1e-4)


def test_derivatives_are_the_relevance(device):
    """Would break if an op, used by itself, did not explain itself by the rule."""
    x, residual, g = tensors(device, X, X, X, requires_grad=(0, 1))
    weight, bias, packed = tensors(device, (70,), (70,), PACKED, requires_grad=(2,))
    s = softmax.softmax(x, None, 0.3, torch.float64)
    (found,) = torch.autograd.grad(s, x, g.double())
    torch.testing.assert_close(found, softmax.softmax_relevance(g.double(), s.detach(), 0.3).float())

    y, rstd = norm.norm(x, weight, bias, 1e-5, 1.0, True)
    (found,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(found, norm.norm_relevance(g, rstd, weight, None, 1.0, 1.0, True))

    y, h, rstd = norm.add_norm(x, residual, weight)
    both = torch.autograd.grad((y, h), (x, residual), (g, 2 * g), retain_graph=True)
    expected = norm.norm_relevance(g, rstd, weight, 2 * g)
    torch.testing.assert_close(both, (expected, expected))
    alone = torch.autograd.grad(h, (x, residual), g)
    torch.testing.assert_close(alone, (g, g))

    (found,) = torch.autograd.grad(gate.activation(x, "gelu"), x, g)
    torch.testing.assert_close(found, gate.activation_relevance(g, x.detach(), "gelu"))
    both = torch.autograd.grad(gate.gate(x, residual, "silu"), (x, residual), g)
    torch.testing.assert_close(both, gate.gate_relevance(g, x.detach(), residual.detach(), "silu"))
    (found,) = torch.autograd.grad(gate.packed_gate(packed, "silu", False), packed, g)
    torch.testing.assert_close(found, gate.packed_gate_relevance(g, packed.detach(), "silu", False))


def test_ops_compile(device):
    """Would break if an op broke the graph, fixed a size, or compiled to something else."""

    def block(x, residual, weight, g):
        y, h, rstd = norm.add_norm(x, residual, weight)
        of_a, of_b = gate.gate_relevance(g, y, h, "silu")
        s = softmax.softmax(h, None, 0.5)
        return norm.norm_relevance(of_a + softmax.softmax_relevance(of_b, s, 0.5), rstd, weight, g)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        args = tensors(device, (rows, 70), (rows, 70), (70,), (2, rows, 70))
        torch.testing.assert_close(compiled(*args), block(*args), rtol=1e-5, atol=1e-5)


def test_can_run_says_why_not(device):
    """Would break if what cannot run were launched, or a boolean mask were taken for a reason."""
    x, weight = tensors(device, X, (70,))
    assert softmax.can_run(x, x < 0) == norm.can_run(x, weight, None) == gate.can_run("silu", x) == (True, "")
    for can_run in (softmax.can_run, norm.can_run):
        assert "float64" in can_run(x, x.double())[1]
        assert "dimension" in can_run(x.sum())[1]
    assert "no kernel for the activation 'tan'" in gate.can_run("tan", x)[1]


def test_what_no_kernel_takes_is_computed_all_the_same(device):
    """Would break if float64 were computed in float32 wherever kernels run."""
    x, packed = (values(shape, torch.float64, device) for shape in (X, PACKED))
    for found in (softmax.softmax(x), *norm.norm(x), gate.packed_gate(packed, "gelu")):
        assert found.dtype == torch.float64
    torch.testing.assert_close(softmax.softmax(x), x.softmax(-1), rtol=0, atol=1e-15)


def test_what_broadcasts_is_left_to_pytorch(device):
    """Would break if a kernel read a tensor that broadcasts as if it had the shape of the others."""
    x, g, one, row = tensors(device, X, G, (1, 70), (3, 1))
    assert "shapes that differ" in gate.can_run("silu", x, one)[1]
    torch.testing.assert_close(gate.gate(x, one, "silu"), torch.nn.functional.silu(x) * one)
    torch.testing.assert_close(gate.gate(one.expand(3, 70), x, "silu"), torch.nn.functional.silu(one) * x)
    found = gate.gate_relevance(g, x, one, "silu")
    torch.testing.assert_close(found, gate.gate_relevance(g, x, one.expand(3, 70), "silu"))
    torch.testing.assert_close(norm.add_norm(x, row)[1], x + row)
    torch.testing.assert_close(norm.norm_relevance(x, one[:, :1].abs()), x * one[:, :1].abs())
    torch.testing.assert_close(norm.norm(x, row[:1, 0])[0], norm.norm(x)[0] * row[0, 0])

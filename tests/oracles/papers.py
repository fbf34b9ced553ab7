"""Two small models whose every step can be treated as a paper says: what is held fixed, what is halved.

``fixed(x)`` is the papers' stop-gradient. With a treatment the model computes the same, and Gradient x Input
of it is the paper's relevance; without one it is the plain model that fxlrp explains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def same(x: Tensor) -> Tensor:
    """No treatment."""
    return x


def fixed(x: Tensor) -> Tensor:
    """A constant for the backward."""
    return x.detach()


def half(x: Tensor) -> Tensor:
    """Half of the coefficient goes on: the uniform or half rule for a product of two."""
    return 0.5 * x + (0.5 * x).detach()


@dataclass(frozen=True)
class Treatment:
    """What happens to each step; the defaults leave the model as it is.

    Attributes:
        rotated: the products of queries and keys with the rotary tables.
        scores: the product of queries and keys.
        probabilities: attention weights.
        mixed: the product of attention weights and values.
        slope: sigmoid(x) in SiLU, ``x * slope(sigmoid(x))``.
        gated: products of a gate and what it gates.
        factor: 1/rms of RMSNorm.
        scan: decay, discretised B and C of a selective scan.
    """

    rotated: Callable[[Tensor], Tensor] = same
    scores: Callable[[Tensor], Tensor] = same
    probabilities: Callable[[Tensor], Tensor] = same
    mixed: Callable[[Tensor], Tensor] = same
    slope: Callable[[Tensor], Tensor] = same
    gated: Callable[[Tensor], Tensor] = same
    factor: Callable[[Tensor], Tensor] = same
    scan: Callable[[Tensor], Tensor] = same


@dataclass(frozen=True)
class Tables:
    """Rotary tables ``[sequence, head]`` of one layer."""

    cos: Tensor
    sin: Tensor


def rotary(length: int, size: int) -> Tables:
    """Rotary tables in float64."""
    angle = torch.outer(
        torch.arange(length, dtype=torch.float64), 10.0 ** -torch.arange(0, 1, 2 / size).double()
    )
    return Tables(torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1))


class Rms(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(size))

    def forward(self, x: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
        return x * factor(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * self.weight


class Layer(nn.Module):
    """A Llama-like layer with eager causal attention."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = Rms(size), Rms(size)
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.up, self.gate, self.down = (
            nn.Linear(size, 2 * size),
            nn.Linear(size, 2 * size),
            nn.Linear(2 * size, size),
        )

    def forward(self, x: Tensor, tables: Tables, how: Treatment) -> Tensor:
        x = x + self.attend(self.first(x, how.factor), tables, how)
        y = self.second(x, how.factor)
        gate = self.gate(y)
        return x + self.down(how.gated(gate * how.slope(torch.sigmoid(gate)) * self.up(y)))

    def attend(self, x: Tensor, tables: Tables, how: Treatment) -> Tensor:
        b, n, d = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, d // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = self.rotate(q, tables, how), self.rotate(k, tables, how)
        scores = how.scores(q @ k.transpose(-1, -2)) / (d // self.heads) ** 0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        mixed = how.mixed(how.probabilities(scores.softmax(-1)) @ v)
        return self.o(mixed.transpose(1, 2).reshape(b, n, d))

    @staticmethod
    def rotate(x: Tensor, tables: Tables, how: Treatment) -> Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return how.rotated(x * tables.cos) + how.rotated(turned * tables.sin)


class TinyLlama(nn.Module):
    """A decoder that computes its rotary tables, one for all layers; takes embeddings for the oracle."""

    def __init__(self, vocabulary: int = 23, size: int = 8, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(Layer(size, heads) for _ in range(layers))
        self.norm = Rms(size)
        self.head = nn.Linear(size, vocabulary)
        self.size = size // heads

    def forward(self, ids: Tensor) -> Tensor:
        tables = rotary(ids.shape[1], self.size)
        return self.run(self.embed(ids), [tables] * len(self.layers), Treatment())

    def run(self, x: Tensor, tables: list[Tables], how: Treatment) -> Tensor:
        for layer, own in zip(self.layers, tables, strict=True):
            x = layer(x, own, how)
        return self.head(self.norm(x, how.factor))


class TinyMamba(nn.Module):
    """One Mamba block per layer, its selective scan as a loop over time."""

    def __init__(self, vocabulary: int = 23, size: int = 6, state: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, size)
        self.blocks = nn.ModuleList(MambaBlock(size, state) for _ in range(layers))
        self.norm = Rms(size)
        self.head = nn.Linear(size, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.run(self.embed(ids), Treatment())

    def run(self, x: Tensor, how: Treatment) -> Tensor:
        for block in self.blocks:
            x = x + block(x, how)
        return self.head(self.norm(x, how.factor))


class MambaBlock(nn.Module):
    """Norm, projection, causal convolution, selective scan, gate, projection (Gu and Dao 2023)."""

    def __init__(self, size: int, state: int) -> None:
        super().__init__()
        self.order = "(db)u"
        wide = 2 * size
        self.norm = Rms(size)
        self.into, self.out = nn.Linear(size, 2 * wide), nn.Linear(wide, size)
        self.conv = nn.Conv1d(wide, wide, 3, groups=wide, padding=2)
        self.to_step, self.to_b, self.to_c = (
            nn.Linear(wide, wide),
            nn.Linear(wide, state),
            nn.Linear(wide, state),
        )
        self.log_a = nn.Parameter(torch.rand(wide, state))
        self.skip = nn.Parameter(torch.ones(wide))

    def forward(self, x: Tensor, how: Treatment) -> Tensor:
        u, z = self.into(self.norm(x, how.factor)).chunk(2, -1)
        u = self.conv(u.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2)
        u = u * how.slope(torch.sigmoid(u))
        step = F.softplus(self.to_step(u))
        decay = how.scan(torch.exp(-step.unsqueeze(-1) * self.log_a.exp()))
        b, c = how.scan(self.to_b(u)).unsqueeze(2), how.scan(self.to_c(u))
        wide, size = u.unsqueeze(-1), how.scan(step).unsqueeze(-1)
        entering = {"(db)u": (size * b) * wide, "d(bu)": size * (b * wide), "(du)b": (size * wide) * b}[
            self.order
        ]
        h = torch.zeros_like(entering[:, 0])
        read = []
        for t in range(u.shape[1]):
            h = decay[:, t] * h + entering[:, t]
            read.append((h @ c[:, t].unsqueeze(-1)).squeeze(-1))
        y = torch.stack(read, 1) + u * self.skip
        return self.out(how.gated(y * (z * how.slope(torch.sigmoid(z)))))

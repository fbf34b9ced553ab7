"""A Vision Transformer for scikit-learn's bundled 8x8 digits."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxlrp.demo._weights import read_weights

# The data set is in order of writing, so its last images come from hands that the training images hardly
# show.
HELD_OUT = 360


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))
        return out


class Block(nn.Module):
    """A pre-norm Vision Transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.dropout(self.attn(self.norm1(x)))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


class DigitsViT(nn.Module):
    """Sixteen 2x2 patches and a class token to ten logits."""

    def __init__(
        self, dim: int = 64, depth: int = 3, heads: int = 4, hidden: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.blocks = nn.ModuleList([Block(dim, heads, hidden, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map pixel_values [B, 1, 8, 8] in [0, 1] -> logits [B, 10]."""
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        cls_token = self.cls_token.expand(pixel_values.shape[0], -1, -1)
        x = torch.cat([cls_token, patches], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def load_digits() -> DigitsViT:
    """Return the model that `examples/train_digits.py` trained, in eval mode on the CPU."""
    model = DigitsViT()
    model.load_state_dict(read_weights("digits.safetensors"))
    return model.eval()


def load_digits_data(split: Literal["held_out", "train"] = "held_out") -> tuple[Tensor, Tensor]:
    """Return images [N, 1, 8, 8] float32 in [0, 1] and labels [N] int64 of scikit-learn's digits.

    - `"held_out"`: the last 360 of the 1,797 images, never seen in training;
    - `"train"`: the 1,437 before them.

    Raises ImportError where scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    digits = datasets.load_digits()
    # Paper is 0 and ink is 1 (the raw scale is 0 to 16), so empty paper has no input to attribute anything
    # to.
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    part = slice(-HELD_OUT, None) if split == "held_out" else slice(0, -HELD_OUT)
    return images[part], labels[part]

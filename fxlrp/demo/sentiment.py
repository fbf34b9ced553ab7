"""A sentiment classifier for English sentences: a two-class Transformer encoder and its tokenizer."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxlrp.demo._weights import read_text, read_weights

MAX_LENGTH = 64
PAD, UNKNOWN = "[PAD]", "[UNK]"

# Words as the treebank splits them: "didn't" is "did" + "n't", "it's" is "it" + "'s"; other marks stand
# alone.
_WORD = re.compile(r"[^\W_]+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\.\.\.|--|[^\W_]+|[^\w\s]|_")


@dataclass(frozen=True)
class Encoding:
    """A batch of texts as the model reads it.

    - `input_ids`: [B, S] int64, padded at the end.
    - `attention_mask`: [B, S] int64, 1 at tokens and 0 at padding.
    - `pieces`: for each text the piece of it that each token stands for. Pieces keep case and leading spaces,
      so `"".join(pieces[b])` reads as the text itself (up to the length limit).
    """

    input_ids: Tensor
    attention_mask: Tensor
    pieces: tuple[tuple[str, ...], ...]


class SentimentTokenizer:
    """Splits text into words and words, greedily, into the longest pieces of a vocabulary.

    Pieces that continue a word start with "##". Every letter is a piece, so a rare word keeps its own
    spelling; only characters never seen in training become "[UNK]".
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Take the pieces in the order of their ids; the first two are the padding and the unknown piece."""
        if tuple(vocabulary[:2]) != (PAD, UNKNOWN):
            raise ValueError(f"a vocabulary starts with {PAD} and {UNKNOWN}, got {list(vocabulary[:2])}")
        self.vocabulary = tuple(vocabulary)
        self._ids = {piece: index for index, piece in enumerate(vocabulary)}
        self._longest = max(len(piece) for piece in vocabulary)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __call__(self, texts: str | Sequence[str], max_length: int = MAX_LENGTH) -> Encoding:
        """Encode one text or a batch of B texts, padded to the longest of them (S <= `max_length`).

        Raises ValueError for a text without any token, since a mean over no tokens has no value.
        """
        batch = [texts] if isinstance(texts, str) else texts
        rows = [list(self.encode(text))[:max_length] for text in batch]
        if not rows or not all(rows):
            raise ValueError("cannot encode an empty text: give at least one word")
        length = max(map(len, rows))
        ids = [[token for token, _ in row] + [0] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        pieces = tuple(tuple(piece for _, piece in row) for row in rows)
        return Encoding(torch.tensor(ids), torch.tensor(mask), pieces)

    def encode(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the id of each token and the slice of `text` it stands for, with the space before it."""
        folded = "".join(map(fold, text))
        shown = 0  # everything before this index is already part of a yielded slice
        for match in words(folded):
            start, stop = match.span()
            while start < stop:
                token, end = self._longest_piece(folded, start, stop, inside=start > match.start())
                yield token, text[shown:end]
                shown = start = end

    def _longest_piece(self, text: str, start: int, stop: int, inside: bool) -> tuple[int, int]:
        mark = "##" if inside else ""
        for end in range(min(stop, start + self._longest), start, -1):
            token = self._ids.get(mark + text[start:end])
            if token is not None:
                return token, end
        return 1, start + 1


def fold(character: str) -> str:
    """Lower-case a character and drop its accent; always one character, so that slices stay aligned."""
    if character in "\u2018\u2019\u00b4`":
        return "'"
    if character in "\u201c\u201d":
        return '"'
    return unicodedata.normalize("NFD", character)[0].lower()[:1]


def words(folded: str) -> Iterator[re.Match[str]]:
    """Yield a match for each word or mark of a folded text."""
    return _WORD.finditer(folded)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class SelfAttention(nn.Module):
    """Multi-head attention over the tokens that the mask allows."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mix x [B, S, D] where mask [B, 1, 1, S] bool is True -> [B, S, D]."""
        batch, length, dim = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, dim // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return out


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = SelfAttention(dim, heads)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = GatedMLP(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend over x [B, S, D] with mask [B, 1, 1, S], then transform each token -> [B, S, D]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class SentimentTransformer(nn.Module):
    """Token ids to two logits, (negative, positive), by the mean over the tokens that are no padding."""

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        depth: int = 3,
        heads: int = 4,
        hidden: int = 192,
        max_length: int = MAX_LENGTH,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(dim, heads, hidden, dropout) for _ in range(depth)])
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map input_ids [B, S] int64, attention_mask [B, S] (1: token, 0: padding) -> logits [B, 2]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.dropout(self.tokens(input_ids) + self.positions(positions))
        allowed = attention_mask.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, allowed)
        weight = attention_mask.to(x.dtype).unsqueeze(-1)
        pooled = (self.norm(x) * weight).sum(dim=1) / weight.sum(dim=1)
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


def load_sentiment() -> tuple[SentimentTransformer, SentimentTokenizer]:
    """Return the trained model, in eval mode on the CPU, and its tokenizer.

    Trained by `examples/train_sentiment.py` on the phrases of the Stanford Sentiment Treebank (Socher et al.
    2013) and on the answers of a fine-tuned all-MiniLM-L6-v2 (Apache-2.0) to them.
    """
    tokenizer = SentimentTokenizer(read_text("sentiment_vocab.txt").splitlines())
    model = SentimentTransformer(len(tokenizer))
    model.load_state_dict(read_weights("sentiment.safetensors"))
    return model.eval(), tokenizer

"""What all reports share: checked numbers, one colour scale, readable tokens."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Scale: TypeAlias = Literal["shared", "method"]
"""Whether full colour means the largest |R| of all methods, or of each method by itself."""

Color: TypeAlias = tuple[int, int, int]

WHITE: Color = (255, 255, 255)
RED: Color = (202, 24, 41)
BLUE: Color = (31, 84, 196)

# Marks by which sentencepiece and byte-level BPE tokenizers write a leading space.
_SPACES = ("▁", "Ġ")


def rgb(share: float) -> Color:
    """Return the colour of a share of the scale: blue at -1, white at 0, red at 1; clipped outside."""
    amount = min(abs(share), 1.0)
    end = RED if share > 0 else BLUE
    red, green, blue = (round(a + amount * (b - a)) for a, b in zip(WHITE, end, strict=True))
    return red, green, blue


def is_dark(color: Color) -> bool:
    """Whether white text reads better on the colour than black text (WCAG relative luminance)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Contrast (L + 0.05) / (0 + 0.05) with black equals (1 + 0.05) / (L + 0.05) with white at this luminance.
    return luminance < 0.179


def token_values(tokens: Sequence[str], relevance: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Check each method's relevance [S] against the S tokens and return it as numbers.

    Raises ValueError for no method, a shape other than [S], or a value that is not finite.
    """
    return {
        name: _checked(name, values, (len(tokens),), "tokens").tolist()
        for name, values in _methods(relevance).items()
    }


def image_values(relevance: Mapping[str, Tensor], image: Tensor | None = None) -> dict[str, Tensor]:
    """Return each method's relevance as [H, W] float64; channels of [C, H, W] are summed.

    Raises ValueError for no method, for sizes that differ among methods or from the image ([H, W] or [C, H,
    W]), and for a value that is not finite.
    """
    maps = {name: plane(name, values) for name, values in _methods(relevance).items()}
    size = next(iter(maps.values())).shape if image is None else image.shape[-2:]
    return {name: _checked(name, values, tuple(size), "pixels") for name, values in maps.items()}


def plane(name: str, values: Tensor) -> Tensor:
    """Sum [C, H, W] over channels to [H, W], or return [H, W] as it is."""
    if values.dim() not in (2, 3):
        raise ValueError(f"{name!r} has shape {list(values.shape)}; give one image, [H, W] or [C, H, W]")
    return values.detach().double().cpu() if values.dim() == 2 else values.detach().double().cpu().sum(dim=0)


def pixels(image: Tensor) -> Tensor:
    """Return an image [H, W] or [C, H, W], C of 1 or 3, as [H, W, 3], stretched to fill [0, 1]."""
    shape = list(image.shape)
    if len(shape) == 2:
        image = image.unsqueeze(0)
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"the image has shape {shape}; give [H, W] or [C, H, W] with 1 or 3 channels")
    values = image.detach().double().cpu()
    low, high = values.min(), values.max()
    values = (values - low) / (high - low) if high > low else torch.zeros_like(values)
    return values.expand(3, -1, -1).permute(1, 2, 0)


def limits(values: Mapping[str, Sequence[float]] | Mapping[str, Tensor], scale: Scale) -> dict[str, float]:
    """Return for each method the |R| that gets full colour; 1 where all is 0, so that 0 stays white."""
    if scale not in ("shared", "method"):
        raise ValueError(f"scale is 'shared' or 'method', got {scale!r}")
    peaks = {name: torch.as_tensor(v, dtype=torch.float64).abs().max().item() for name, v in values.items()}
    if scale == "shared":
        peaks = dict.fromkeys(peaks, max(peaks.values()))
    return {name: peak if peak > 0 else 1.0 for name, peak in peaks.items()}


def pieces(tokens: Sequence[str]) -> list[str]:
    """Return tokens as pieces that read like the text when joined: a space before each word but the first.

    Knows the spellings of wordpiece ("##ing"), sentencepiece and byte-level BPE, and pieces that have their
    spaces already. Control characters become visible signs, since no terminal should obey a token.
    """
    spaced = [_visible(token) for token in tokens]
    if any(token.startswith((" ", *_SPACES)) for token in spaced):
        out = [" " + token[1:] if token.startswith(_SPACES) else token for token in spaced]
    else:
        out = [token[2:] if token.startswith("##") and len(token) > 2 else " " + token for token in spaced]
    return [out[0].removeprefix(" ") or " ", *out[1:]] if out else out


def number(value: float) -> str:
    """Format with a sign and four significant digits."""
    return f"{value:+.4g}" if value else "0"


def aligned(values: Sequence[float], peak: float) -> list[str]:
    """Format with a sign and the decimals that show `peak` with four digits, so that columns line up."""
    exponent = math.floor(math.log10(peak))
    if not -4 <= exponent <= 6:
        return [f"{value:+.3e}" for value in values]
    return [f"{value:+.{max(0, 3 - exponent)}f}" for value in values]


def _visible(token: str) -> str:
    return "".join(
        {"\n": "⏎", "\t": "⇥"}.get(c, "�") if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c
        for c in token
    )


def _methods(relevance: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not relevance:
        raise ValueError("no relevance to show: give at least one method")
    return relevance


def _checked(name: str, values: Tensor, shape: tuple[int, ...], of: str) -> Tensor:
    values = values.detach().double().cpu()
    if tuple(values.shape) != shape:
        size = " x ".join(map(str, shape))
        raise ValueError(f"relevance of {name!r} has shape {list(values.shape)}, but there are {size} {of}")
    if values.numel() == 0:
        raise ValueError(f"there are no {of} to show")
    broken = int((~values.isfinite()).sum())
    if broken:
        raise ValueError(f"relevance of {name!r} has {broken} values that are not finite")
    return values

"""Example inputs: for each row a few ways to call its model, the first of which that works is taken.

Token ids of an example are all different, and different from positions, masks and special tokens, so that a
lookup shows by its values alone which places of the input it reads: see ``reference``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .build import first_line
from .config import parts
from .overrides import DECODERS, FLOATS, PIXELS
from .rows import Row
from .sizes import is_int

#: Range of ordinary token ids.
_FIRST, _END = 30, 98
_SHAPES = ((2, 16), (3, 10))
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "im_patch_id")


@dataclass(frozen=True, eq=False)
class Example:
    """One call of a model.

    Attributes:
        name: how the model is called: which inputs, which mask.
        inputs: the call's keyword arguments.
    """

    name: str
    inputs: dict[str, Any]


def examples(
    row: Row, model: nn.Module, reasons: list[str], *, other: bool = False, seed: int = 2
) -> Iterator[Example]:
    """Ways to call a row's model, the usual one first.

    Args:
        row: the row.
        model: its model.
        reasons: where to say why some of the ways do not come about.
        other: another batch size and length than the first inputs have, and other values.
        seed: of the values.
    """
    batch, length = _SHAPES[other]
    maker = _Maker(row, model, batch, length, torch.Generator().manual_seed(seed + other), reasons)
    for example in getattr(maker, row.inputs.replace("-", "_"))():
        yield Example(example.name, {**example.inputs, **maker.switches()})


@dataclass(eq=False)
class _Maker:
    """Makes the inputs of one model, of one size."""

    row: Row
    model: nn.Module
    batch: int
    length: int
    generator: torch.Generator
    reasons: list[str]
    accepted: frozenset[str] = field(init=False)
    config: Any = field(init=False)
    pool: Tensor = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.accepted = frozenset(inspect.signature(self.model.forward).parameters)
        self.config = self.model.config
        self.pool = self._ids()

    # -- what calls are made of ------------------------------------------------------------------------------

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ids(self, length: int) -> Tensor:
        """Ids ``[batch, length]`` that occur nowhere else in the call, as long as there are enough."""
        count = self.batch * length
        if count > len(self.pool):
            return torch.randint(_FIRST, self.end, (self.batch, length), generator=self.generator)
        taken, self.pool = self.pool[:count], self.pool[count:]
        return taken.view(self.batch, length)

    def masks(self, length: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The last row padded on its right, no padding, no mask."""
        if "attention_mask" in self.accepted:
            ones = torch.ones(self.batch, length, dtype=torch.long)
            padded = ones.clone()
            padded[-1, length - 3 :] = 0
            yield "padded", {"attention_mask": padded}
            yield "unpadded", {"attention_mask": ones}
        yield "no mask", {}

    def switches(self) -> dict[str, Any]:
        return {"use_cache": False} if "use_cache" in self.accepted else {}

    @property
    def decodes(self) -> bool:
        """Whether the call names the decoder's ids."""
        return (
            self.row.task in ("seq2seq", "itt", "itt_img", "masked_lm")
            and (getattr(self.config, "is_encoder_decoder", False) or self.row.model in DECODERS)
            and "decoder_input_ids" in self.accepted
        )

    def _ids(self) -> Tensor:
        configs = parts(self.config)
        sizes = [v for c in configs if is_int(v := getattr(c, "vocab_size", None)) and v > _FIRST + 2]
        self.end = min([_END, *sizes])
        special = {v for c in configs for k, v in vars(c).items() if "token_i" in k and is_int(v)}
        ordinary = torch.tensor([i for i in range(_FIRST, self.end) if i not in special])
        return ordinary[torch.randperm(len(ordinary), generator=self.generator)]

    # -- by what is explained --------------------------------------------------------------------------------

    def text(self) -> Iterator[Example]:
        key = "input_ids" if "input_ids" in self.accepted else "inputs"
        ids = self.ids(self.length)
        sizes = {"batch": self.batch, "length": self.length, "frames": 8 * self.length}
        extra: dict[str, Any] = {
            name: self.floats(*(sizes.get(s, s) for s in shape))
            for name, shape in FLOATS.get(self.row.model, {}).items()
        }
        if self.decodes:
            extra["decoder_input_ids"] = self.ids(self.length // 2 - 1)
        elif getattr(self.config, "is_encoder_decoder", False) and is_int(self.config.eos_token_id):
            ids[:, -1] = self.config.eos_token_id  # the classified position
        for name, mask in self.masks(self.length):
            yield Example(f"ids, {name}", {key: ids, **mask, **extra})
        if "pixel_values" in self.accepted:
            pixels = self.floats(self.batch, 3, *self._image_sizes()[0])
            for name, mask in self.masks(self.length):
                yield Example(f"ids and pixels, {name}", {key: ids, "pixel_values": pixels, **mask, **extra})
        if "inputs_embeds" in self.accepted:
            embedded = self.floats(self.batch, self.length, self._width())
            for name, mask in self.masks(self.length):
                yield Example(f"embeddings, {name}", {"inputs_embeds": embedded, **mask, **extra})

    def image(self) -> Iterator[Example]:
        if self.row.model == "siglip2":
            size = self.config.vision_config.patch_size
            yield Example(
                "patches",
                {
                    "pixel_values": self.floats(self.batch, 16, 3 * size * size),
                    "pixel_attention_mask": torch.ones(self.batch, 16, dtype=torch.long),
                    "spatial_shapes": torch.tensor([[4, 4]] * self.batch),
                },
            )
        elif "pixel_values" not in self.accepted and "input_ids" in self.accepted:
            yield Example("ids", {"input_ids": self.ids(self.length)})
        elif "input_ids" in self.accepted:
            yield from self.image_text()
        else:
            key = "pixel_values" if "pixel_values" in self.accepted else "inputs"
            channels = getattr(self.config, "num_channels", 3)
            for height, width in self._image_sizes():
                pixels = self.floats(self.batch, channels if is_int(channels) else 3, height, width)
                yield Example(f"pixels {height}x{width}", {key: pixels})

    def audio(self) -> Iterator[Example]:
        config = self.config
        if self.row.model == "audio-spectrogram-transformer":
            yield Example(
                "spectrogram",
                {"input_values": self.floats(self.batch, config.max_length, config.num_mel_bins)},
            )
        elif "input_values" in self.accepted:
            wave = {"input_values": self.floats(self.batch, 2400)}
            yield Example("wave, unpadded", {**wave, "attention_mask": torch.ones(self.batch, 2400).long()})
            yield Example("wave, no mask", wave)
        elif hasattr(config, "feature_projection_input_dim"):
            features = self.floats(self.batch, 24, config.feature_projection_input_dim)
            mask = torch.ones(self.batch, 24, dtype=torch.long)
            yield Example("features, unpadded", {"input_features": features, "attention_mask": mask})
        else:
            bins, frames = (
                getattr(config, "num_mel_bins", 80),
                2 * getattr(config, "max_source_positions", 64),
            )
            yield Example("mel spectrogram", {"input_features": self.floats(self.batch, bins, frames)})

    def image_text(self) -> Iterator[Example]:
        for name, pixels, extra in self._pixels():
            self.pool = self._ids()
            if "qformer_input_ids" in self.accepted:
                extra["qformer_input_ids"] = self.ids(6)
                extra["qformer_attention_mask"] = torch.ones(self.batch, 6, dtype=torch.long)
            try:
                places = self._places(pixels, extra)
            except Exception as error:  # the model does not take pixels in this layout
                self.reasons.append(f"{name}: {type(error).__name__}: {first_line(error)}")
                continue
            inputs: dict[str, Any] = {**extra, "pixel_values": pixels}
            token = next((v for k in _IMAGE_TOKENS if is_int(v := getattr(self.config, k, None))), None)
            length = (places or 0) + 6
            ids = torch.full((self.batch, length), -1)
            text = torch.tensor([i for i in range(length) if not (token and places and 0 < i <= places)])
            ids[:, text] = self.ids(len(text))
            ids[ids < 0] = token or 0
            is_image = (ids == token).long() if token is not None else torch.zeros_like(ids)
            self._add(inputs, "input_ids", ids)
            self._add(inputs, "mm_token_type_ids", is_image)
            self._add(inputs, "token_type_ids", is_image)
            if self.row.model == "vision-encoder-decoder":
                inputs = {"pixel_values": pixels, "decoder_input_ids": self.ids(8)}
            elif self.decodes:
                inputs["decoder_input_ids"] = self.ids(8)
            if self.row.model == "idefics":
                inputs["image_attention_mask"] = torch.ones(self.batch, length, 1, dtype=torch.long)
            if self.row.model == "kosmos-2":
                places = self.config.latent_query_num
                inputs["image_embeds_position_mask"] = torch.zeros(self.batch, length)
                inputs["image_embeds_position_mask"][:, 1 : 1 + places] = 1
            if "attention_mask" in self.accepted:
                mask = torch.ones(self.batch, length, dtype=torch.long)
                yield Example(f"{name}, unpadded", {**inputs, "attention_mask": mask})
            yield Example(f"{name}, no mask", inputs)

    # -- pieces ----------------------------------------------------------------------------------------------

    def _add(self, inputs: dict[str, Any], name: str, tensor: Tensor) -> None:
        if name in self.accepted:
            inputs[name] = tensor

    def _width(self) -> int:
        model: Any = self.model
        weight = getattr(model.get_input_embeddings(), "weight", None)
        return int(weight.shape[1]) if weight is not None else int(self.config.hidden_size)

    def _image_sizes(self) -> list[tuple[int, int]]:
        config = getattr(self.config, "vision_config", None) or self.config
        size = getattr(config, "image_size", None) or getattr(self.config, "image_size", None)
        sizes = (
            [tuple(size[:2])] if isinstance(size, (list, tuple)) else [(size, size)] if is_int(size) else []
        )
        return [*sizes, *(s for s in ((32, 32), (64, 64), (224, 224)) if s not in sizes)]

    def _pixels(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Pixels in the layouts that libraries know, with what says their sizes."""
        vision = getattr(self.config, "vision_config", None) or self.config
        height, width = self._image_sizes()[0]
        batch = self.batch
        if self.row.model in PIXELS:
            own = {
                name: self.floats(*found) if isinstance(found, tuple) else torch.tensor(found)
                for name, found in PIXELS[self.row.model](batch).items()
            }
            yield "layout of its own", own.pop("pixel_values"), own
        if self.accepted & {"image_grid_thw", "image_grid_hws"}:
            patch, frames = getattr(vision, "patch_size", 8), getattr(vision, "temporal_patch_size", 1) or 1
            grid = {"image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}
            yield "patches", self.floats(batch * 16, 3 * frames * patch * patch), grid
            yield "square patches", self.floats(batch * 16, 3, patch, patch), grid
        yield "image", self.floats(batch, 3, height, width), {}
        if "image_sizes" in self.accepted:
            sizes = {"image_sizes": torch.tensor([[height, width]] * batch)}
            yield "image with sizes", self.floats(batch, 3, height, width), sizes
            yield "two tiles", self.floats(batch, 2, 3, height, width), sizes
        yield "one tile", self.floats(batch, 1, 3, height, width), {}

    def _places(self, pixels: Tensor, extra: dict[str, Any]) -> int | None:
        """How many positions of the text an image takes; None where the model does not say."""
        part: Any
        inner = getattr(self.model, "model", None)
        for part in (self.model, inner, getattr(inner, "encoder", None)):
            if hasattr(part, "get_image_features"):
                with torch.no_grad():
                    return _positions(part.get_image_features(pixel_values=pixels, **extra)) // self.batch
        return None


def _positions(features: Any) -> int:
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, (list, tuple)):
        if all(isinstance(f, Tensor) and f.dim() == 2 for f in features):
            return sum(len(f) for f in features)
        return _positions(features[0])
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            return _positions(getattr(features, name))
    if getattr(features, "deepstack_features", None):  # pairs of a layer and what is added there
        return _positions(features.deepstack_features[0][1])
    raise ValueError("no image features")

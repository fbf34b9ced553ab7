"""A tiny config of each model type: the default config with its sizes reduced and its structure kept."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .overrides import BY_TASK, CONFIGS, DEFAULT, PAIR_DECODER, PAIRS, PART
from .rows import TASKS, Row
from .sizes import DEPTHS, HEAD, HEADS, LAYERS, SIZES, SPECIAL, VOCABULARY, is_int, size, stages

#: Small in every size, and small in depth only, for configs whose sizes depend on each other.
PROFILES = ("sizes", "depth")
_CLASSES = 5


def tiny_config(row: Row, profile: str = "sizes") -> PreTrainedConfig:
    """The tiny config of a row."""
    if row.model in PAIRS:
        config = _pair(row.model, profile)
    else:
        config = _tiny(CONFIG_MAPPING[row.model], profile, BY_TASK.get((row.task, row.model), {}))
    texts = [c for c in (config, getattr(config, "text_config", None)) if isinstance(c, PreTrainedConfig)]
    if TASKS[row.task].labels:
        config.num_labels = _CLASSES
    if row.task == "seq_cls" and getattr(config, "pad_token_id", None) is None:
        for c in texts:
            c.pad_token_id = 0
    return config


def parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and all configs inside it."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(c for value in inner for c in parts(value))]


def _pair(model: str, profile: str) -> PreTrainedConfig:
    encoder, decoder = PAIRS[model]
    kind: Any = CONFIG_MAPPING[model]
    config: PreTrainedConfig = kind.from_encoder_decoder_configs(
        _tiny(CONFIG_MAPPING[encoder], profile), _tiny(CONFIG_MAPPING[decoder], profile, PAIR_DECODER)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def _tiny(
    kind: type[PreTrainedConfig], profile: str, extra: dict[str, Any] | None = None
) -> PreTrainedConfig:
    settings = {**_shrunk(kind, profile), **CONFIGS.get(kind.model_type, {}), **(extra or {})}
    for name, value in settings.items():
        if value is PART:
            settings[name] = _tiny(_part(kind, name), profile)
    return kind(**{name: value for name, value in settings.items() if value is not DEFAULT})


def _part(kind: type[PreTrainedConfig], name: str) -> type[PreTrainedConfig]:
    """The class of a config's part."""
    found: Any = kind.sub_configs[name]
    return getattr(found, "config_class", found)  # type: ignore[no-any-return]


def _shrunk(kind: type[PreTrainedConfig], profile: str) -> dict[str, Any]:
    """What to give the config's class so that it comes out small."""
    accepted = set(getattr(kind, "__dataclass_fields__", {})) | set(
        inspect.signature(kind.__init__).parameters
    )
    defaults = {
        name: value for name, value in vars(kind()).items() if name in accepted and not name.startswith("_")
    }
    chosen, depth = _chosen_layers(defaults)
    special = iter(range(SPECIAL, VOCABULARY))
    for name, value in defaults.items():
        if name in chosen:
            continue
        if isinstance(value, PreTrainedConfig):
            chosen[name] = _tiny(type(value), profile)
            continue
        tiny = _field(name, value, profile, special)
        if tiny is not None:
            chosen[name] = depth if name in DEPTHS and depth and value == _depth(defaults) else tiny
    if is_int(defaults.get("kv_lora_rank")) and "num_key_value_heads" in chosen:
        chosen["num_key_value_heads"] = HEADS  # latent attention has as many heads for keys as for queries
    return chosen


def _field(name: str, value: Any, profile: str, special: Any) -> Any | None:
    if name in ("rope_parameters", "rope_scaling"):
        return _rope(value) if isinstance(value, dict) else None
    if name.endswith(("token_id", "token_index", "_token_ids")) or name in _TOKENS:
        return _tokens(value, special)
    if isinstance(value, (list, tuple)):
        return stages(name, value) if profile == "sizes" else None
    if not is_int(value):
        return None
    is_depth = name in DEPTHS or SIZES.get(name) == LAYERS
    return size(name, value) if profile == "sizes" or is_depth or "vocab_size" in name else None


_TOKENS = ("unk_index", "mask_index", "tag_pad_id", "subs_pad_id")


def _tokens(value: Any, special: Any) -> Any | None:
    """Ids inside the small vocabulary for special tokens outside of it."""
    if is_int(value) and value >= VOCABULARY - 30:
        return next(special)
    if isinstance(value, (list, tuple)) and value and all(map(is_int, value)) and max(value) >= VOCABULARY:
        return type(value)(next(special) for _ in value)
    return None


def _rope(value: dict[str, Any]) -> dict[str, Any] | None:
    """Rotary parameters whose sections for time, height and width fit the small head."""
    found = copy.deepcopy(value)
    for rope in (found, *(inner for inner in found.values() if isinstance(inner, dict))):
        if rope.get("mrope_section"):
            pairs = int(HEAD // 2 * rope.get("partial_rotary_factor", 1.0))
            side = (pairs - max(1, pairs // 4)) // 2
            rope["mrope_section"] = [pairs - 2 * side, side, side]
    return found if found != value else None


def _depth(defaults: dict[str, Any]) -> int | None:
    """How many layers the default config has."""
    return next((defaults[name] for name in DEPTHS if is_int(defaults.get(name))), None)


def _chosen_layers(defaults: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Lists with an entry for each layer, reduced to a few layers of which every kind is there once.

    Returns:
        The reduced lists by name, and how many layers they have; None where there are no such lists.
    """
    depth = _depth(defaults)
    lists = {
        name: value
        for name, value in defaults.items()
        if isinstance(value, (list, tuple))
        and depth is not None
        and 2 < depth == len(value)
        and name != "conv_dim"
        and all(isinstance(v, (str, int, float, type(None))) for v in value)
    }
    if not lists or depth is None:
        return {}, None
    seen: set[tuple[str, Any]] = set()
    layers: list[int] = []
    for i in range(depth):
        kinds = {
            (name, value[i])
            for name, value in lists.items()
            if isinstance(value[i], (str, bool)) or name in ("no_rope_layers", "moe_layers")
        }
        if not kinds <= seen and len(layers) < 5:
            layers.append(i)
            seen |= kinds
    layers += [i for i in range(depth) if i not in layers][: max(0, 2 - len(layers))]
    layers.sort()
    return {name: type(value)([value[i] for i in layers]) for name, value in lists.items()}, len(layers)

"""What the text encoder's configuration files say: its two networks, and how pictures are cut.

Both published layouts of config.json are read: the language model's fields at the top level, or
under `text_config`. What is not implemented is refused, never ignored. Nothing is built here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from image_worker.errors import ModelMismatch

_BICUBIC = 3  # Pillow's number of the filter


@dataclass(frozen=True)
class LanguageConfig:
    """The language model: `layers` layers of `width`; `key_heads` of its `heads` have keys.

    inner: the MLP's width; sections: how many of a head's angles are a token's time, row, column;
    image_token: the id that stands where a picture's tokens go.
    """

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    epsilon: float
    theta: float
    sections: list[int]
    image_token: int

    @property
    def head(self) -> int:
        """Numbers of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: `layers` layers of `width`, all but `full` attending within windows.

    A patch is `patch` pixels a side and `frames` frames deep; `merge` by `merge` patches become a
    token of width `out`; window: tokens a side; inner: the MLP's width.
    """

    width: int
    inner: int
    layers: int
    heads: int
    channels: int
    patch: int
    frames: int
    merge: int
    window: int
    full: frozenset[int]
    out: int
    theta: float

    @property
    def head(self) -> int:
        """Numbers of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class Patching:
    """How a picture becomes patches: of `least` to `most` pixels, scaled, normalised, cut.

    patch, merge, frames: as of `VisionConfig`; mean, deviation: of each channel.
    """

    patch: int
    merge: int
    frames: int
    least: int
    most: int
    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def read_config(config: Mapping[str, Any]) -> tuple[LanguageConfig, VisionConfig]:
    """Both parts of a text encoder's config.json.

    Raises:
        ModelMismatch: something is missing or wrong, or not implemented.
    """
    top = _Fields("text_encoder/config.json", config)
    text = top.part("text_config") or top
    language, vision = _language(text, top.number("image_token_id", least=0)), _vision(top)
    text.check(vision.out == language.width, "vision_config's out_hidden_size is not hidden_size")
    return language, vision


def read_patching(config: Mapping[str, Any]) -> Patching:
    """A processor's preprocessor_config.json; what it leaves out is as Qwen2-VL has it.

    Raises:
        ModelMismatch: something is wrong, or not implemented.
    """
    fields = _Fields("processor/preprocessor_config.json", config)
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        fields.expect(name, True)
    fields.expect("resample", _BICUBIC)
    size = fields.part("size") or fields.instead(shortest_edge=56**2, longest_edge=28**2 * 1280)
    found = Patching(
        patch=fields.number("patch_size", 14),
        merge=fields.number("merge_size", 2),
        frames=fields.number("temporal_patch_size", 2),
        # The older fields; where both are there, these are the ones that count.
        least=fields.number("min_pixels", size.get("shortest_edge")),
        most=fields.number("max_pixels", size.get("longest_edge")),
        scale=fields.real("rescale_factor", 1 / 255),
        mean=fields.reals("image_mean", (0.48145466, 0.4578275, 0.40821073)),
        deviation=fields.reals("image_std", (0.26862954, 0.26130258, 0.27577711)),
    )
    fields.check(len(found.mean) == len(found.deviation) == 3, "pictures have 3 channels")
    return found


def _language(text: _Fields, image_token: int) -> LanguageConfig:
    text.expect("hidden_act", "silu")
    text.check(
        not text.get("use_sliding_window")
        and "sliding_attention" not in (text.get("layer_types") or ()),
        "sliding windows are not implemented",
    )
    rope = text.part("rope_scaling") or text.part("rope_parameters") or text.instead()
    rope.expect("rope_type" if rope.get("rope_type") else "type", "default", "mrope")
    found = LanguageConfig(
        width=text.number("hidden_size"),
        inner=text.number("intermediate_size"),
        layers=text.number("num_hidden_layers"),
        heads=text.number("num_attention_heads"),
        key_heads=text.number("num_key_value_heads"),
        vocabulary=text.number("vocab_size"),
        epsilon=text.real("rms_norm_eps"),
        theta=rope.real("rope_theta", text.get("rope_theta")),
        sections=[int(size) for size in rope.reals("mrope_section")],
        image_token=image_token,
    )
    text.check(
        found.width % found.heads == found.heads % found.key_heads == 0,
        "hidden_size, num_attention_heads and num_key_value_heads do not divide each other",
    )
    text.check(
        len(found.sections) == 3 and 2 * sum(found.sections) == found.head,
        "mrope_section does not divide a head's angles into three",
    )
    return found


def _vision(top: _Fields) -> VisionConfig:
    fields = top.part("vision_config")
    if fields is None:
        raise ModelMismatch(f"{top.file} of the model has no vision_config")
    fields.expect("hidden_act", "silu")
    rope = fields.part("rope_parameters") or fields.instead()
    rope.expect("rope_type", "axial", "default")
    patch, merge = fields.number("patch_size"), fields.number("spatial_merge_size")
    found = VisionConfig(
        width=fields.number("hidden_size"),
        inner=fields.number("intermediate_size"),
        layers=fields.number("depth"),
        heads=fields.number("num_heads"),
        channels=fields.number("in_channels", 3),
        patch=patch,
        frames=fields.number("temporal_patch_size"),
        merge=merge,
        window=fields.number("window_size") // merge // patch,
        full=frozenset(int(number) for number in fields.reals("fullatt_block_indexes")),
        out=fields.number("out_hidden_size"),
        theta=rope.real("rope_theta", 10_000.0),
    )
    fields.check(found.window > 0, "window_size is less than a token")
    fields.check(
        found.width % found.heads == 0 and found.head % 4 == 0,
        "heads do not divide hidden_size, or 4 does not divide a head",
    )
    return found


class _Fields:
    """A JSON object of a file, which its errors name. A field that is null is not there."""

    def __init__(self, file: str, content: Mapping[str, Any]) -> None:
        self.file, self._content = file, content

    def get(self, name: str) -> Any:
        """None: it is not there."""
        return self._content.get(name)

    def part(self, name: str) -> _Fields | None:
        """The object within, None where there is none."""
        found = self.get(name)
        return None if found is None else _Fields(self.file, self._is(name, found, dict))

    def instead(self, **content: Any) -> _Fields:
        """What counts where a part is not there."""
        return _Fields(self.file, content)

    def number(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer."""
        found: int = self._is(name, self._or(name, default), int)
        self.check(found >= least, f"{name} is {found}")
        return found

    def real(self, name: str, default: float | None = None) -> float:
        """A number."""
        return float(self._is(name, self._or(name, default), (int, float)))

    def reals(self, name: str, default: tuple[float, ...] | None = None) -> tuple[float, ...]:
        """A list of numbers."""
        found = self._is(name, self._or(name, default), (list, tuple))
        return tuple(float(self._is(name, number, (int, float))) for number in found)

    def expect(self, name: str, *implemented: Any) -> None:
        """Refuses a field that says anything else."""
        found = self.get(name)
        if found is not None and found not in implemented:
            raise ModelMismatch(
                f"{self.file} of the model says {name}: {found!r}, which is not implemented; "
                f"{implemented[0]!r} is"
            )

    def check(self, holds: bool, otherwise: str) -> None:
        """Refuses the file where something does not hold."""
        if not holds:
            raise ModelMismatch(f"{self.file} of the model does not fit: {otherwise}")

    def _or(self, name: str, default: Any) -> Any:
        found = self.get(name)
        return default if found is None else found

    def _is(self, name: str, found: Any, kind: Any) -> Any:
        self.check(
            isinstance(found, kind),
            f"{name} is {found!r}" if found is not None else f"{name} is missing",
        )
        return found

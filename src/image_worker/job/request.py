"""What a caller may ask for, checked before anything is fetched or computed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from image_worker.catalog import ModelEntry
from image_worker.errors import InvalidRequest
from image_worker.job import loras

GRID = 16  # output sides are multiples of this
MAX_SEED = 2**63 - 1
_MAX_PROMPT_CHARACTERS = 20_000  # bounds the work of counting tokens
_QUALITY = 90
MAX_LORAS, MAX_LORA_SCALE = 4, 4.0

_SCHEMES = ("http://", "https://")
_RANDOM_SEEDS = 2**53  # below this, a number survives a client's floating-point JSON

Side = Annotated[int, Field(ge=GRID, le=2**16, multiple_of=GRID)]
PromptText = Annotated[str, Field(max_length=_MAX_PROMPT_CHARACTERS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ImageSource(_Strict):
    """One picture: an http(s) URL or base64, with or without a data prefix."""

    url: str | None = None
    base64: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.url is None) == (self.base64 is None):
            raise ValueError("give exactly one of url and base64")
        return self

    @classmethod
    def either(cls, value: str) -> ImageSource:
        """A URL if it looks like one, base64 otherwise."""
        is_url = "://" in value[:16]
        return cls(url=value) if is_url else cls(base64=value)


def _text_as_source(value: object) -> object:
    return ImageSource.either(value) if isinstance(value, str) else value


ImageOrText = Annotated[
    ImageSource, BeforeValidator(_text_as_source, json_schema_input_type=str | ImageSource)
]


def _known_form(source: str) -> str:
    loras.parse(source)
    return source


class LoraOption(_Strict):
    """A LoRA for one job: a file of the hub, behind an https URL, or of the worker's own folder."""

    source: Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_known_form)]
    scale: float = Field(1.0, ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)

    @property
    def name(self) -> str:
        """Of its file: for replies and logs, since a URL may hold a secret."""
        return loras.parse(self.source).name


class EditRequest(_Strict):
    """One job. Absent options take the model's defaults in `worker.py`."""

    prompt: Annotated[PromptText, Field(min_length=1, pattern=r"\S")]
    negative_prompt: PromptText | None = None
    image: str | None = None
    image_url: str | None = None
    image_base64: str | None = None
    images: list[ImageOrText] | None = Field(None, min_length=1, max_length=4)
    loras: list[LoraOption] | None = Field(None, max_length=MAX_LORAS)
    true_cfg_scale: float | None = Field(None, ge=1, le=20)
    num_inference_steps: int | None = Field(None, ge=1, le=100)
    seed: int = Field(default_factory=lambda: secrets.randbelow(_RANDOM_SEEDS), ge=0, le=MAX_SEED)
    width: Side | None = None
    height: Side | None = None
    num_images: int = Field(1, ge=1, le=4)
    output_format: Literal["png", "jpeg", "webp"] = "png"
    quality: int | None = Field(None, ge=1, le=100)
    reencode: bool = False
    embed_metadata: bool | None = None

    @classmethod
    def parse(cls, job_input: object, entry: ModelEntry) -> EditRequest:
        """Checks a job's `input` for a model.

        Raises:
            InvalidRequest: names the first field at fault, and says all that is wrong.
        """
        if not isinstance(job_input, Mapping):
            raise InvalidRequest("the job's input must be a JSON object", field="input")
        try:
            request = cls.model_validate(dict(job_input))
        except ValidationError as error:
            raise translate(error) from None
        request._check_for(entry)
        return request

    @property
    def sources(self) -> list[tuple[str, ImageSource]]:
        """Every picture with the name of its field."""
        if self.image is not None:
            return [("image", ImageSource.either(self.image))]
        if self.image_url is not None:
            return [("image_url", ImageSource(url=self.image_url))]
        if self.image_base64 is not None:
            return [("image_base64", ImageSource(base64=self.image_base64))]
        return [(f"images[{number}]", image) for number, image in enumerate(self.images or [])]

    @property
    def encoder_quality(self) -> int:
        """Quality for jpeg and webp."""
        return _QUALITY if self.quality is None else self.quality

    @property
    def seeds(self) -> list[int]:
        """One per picture: the seed, then the numbers after it."""
        return [(self.seed + number) % (MAX_SEED + 1) for number in range(self.num_images)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [
            name
            for name in ("image", "image_url", "image_base64", "images")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"give pictures in one field only, not in {' and '.join(given)}")
        sources = [lora.source for lora in self.loras or ()]
        if len(set(sources)) < len(sources):
            raise ValueError("loras has a source twice; give it once, with one scale")
        if self.quality is not None and self.output_format == "png":
            raise ValueError("quality applies to output_format jpeg and webp; png has none")
        return self

    def _check_for(self, entry: ModelEntry) -> None:
        pictures = self.sources
        for field, source in pictures:
            if source.url is not None and not source.url.lower().startswith(_SCHEMES):
                raise InvalidRequest("a URL must start with http:// or https://", field=field)
        if not pictures and entry.max_images:
            raise InvalidRequest(
                f"{entry.name} edits pictures: give image, image_url, image_base64 or images",
                field="image",
            )
        if len(pictures) > entry.max_images:
            takes = f"at most {entry.max_images} pictures" if entry.max_images else "no picture"
            raise InvalidRequest(f"{entry.name} takes {takes}", field=_base(pictures[0][0]))
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and not entry.min_side <= side <= entry.max_side:
                raise InvalidRequest(
                    f"{side} is not within {entry.min_side} to {entry.max_side}", field=name
                )


def _base(field: str) -> str:
    return field.partition("[")[0]


def translate(error: ValidationError, *parents: str) -> InvalidRequest:
    """Pydantic's findings as this worker's error; `parents` are the fields around the model."""
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        field = _path(parents + problem["loc"])
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            reason = "there is no such field"
        problems.setdefault(field, reason)
    message = "; ".join(
        f"{field}: {reason}" if field else reason for field, reason in problems.items()
    )
    return InvalidRequest(message[:2000], field=next(iter(problems)) or None)


def _path(location: tuple[int | str, ...]) -> str:
    """`("images", 0, "url")` as `images[0].url`. A name that a caller made up is cut short."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part[:100] or '""'
            path += f".{name}" if path else name
    return path


def summary(request: EditRequest) -> dict[str, Any]:
    """What is worth logging of a request: no picture, no prompt."""
    found = request.model_dump(
        exclude={
            *("prompt", "negative_prompt", "image", "image_url", "image_base64", "images"),
            "loras",
        },
        exclude_none=True,
    ) | {"pictures": len(request.sources)}
    return found | ({"loras": named(request)} if request.loras else {})


def named(request: EditRequest) -> list[dict[str, Any]]:
    """The LoRAs of a request as replies and pictures tell of them."""
    return [{"name": lora.name, "scale": lora.scale} for lora in request.loras or ()]

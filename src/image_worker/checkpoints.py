"""Published files that hold a transformer: where they are, whose they are, how they are sampled.
And those that hold a text encoder, which all full-size models share.

To add one, add a line. Files that are not listed are served, too: what they are is found in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from image_worker.catalog import HubFile
from image_worker.errors import InvalidSettings
from image_worker.settings import Precision, Settings

_ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<path>[^@]+)(?:@(?P<revision>[^@]+))?")


@dataclass(frozen=True)
class Published:
    """A file, the model of the catalogue that it belongs to, and how many steps it is meant for.

    lightning_steps: of the Lightning LoRA that is merged in it; 0: there is none; like: the
    precision of this worker whose weights take as much memory; None: there is none.
    """

    repo: str
    path: str
    model: str
    lightning_steps: int = 0
    like: Precision | None = None


_NUNCHAKU = "nunchaku-tech/nunchaku-qwen-image-edit-2509"


def _of_nunchaku(kind: str) -> Iterator[Published]:
    """kind: `int4` or `fp4`."""
    for rank in (32, 128):
        name = f"svdq-{kind}_r{rank}-qwen-image-edit-2509"
        like: Precision | None = "svdq" if rank == 32 else None
        yield Published(_NUNCHAKU, f"{name}.safetensors", "edit-2509", 0, like)
        for steps in (4, 8):
            for path in (
                f"{name}-lightningv2.0-{steps}steps.safetensors",
                f"lightning-251115/{name}-lightning-{steps}steps-251115.safetensors",
            ):
                yield Published(_NUNCHAKU, path, "edit-2509", steps, like)


PUBLISHED: tuple[Published, ...] = (
    *_of_nunchaku("int4"),
    Published(
        "lightx2v/Qwen-Image-Lightning",
        "Qwen-Image-Edit-2509/qwen_image_edit_2509_fp8_e4m3fn_scaled.safetensors",
        "edit-2509",
        like="fp8",
    ),
    Published(
        "lightx2v/Qwen-Image-Edit-2511-Lightning",
        "qwen_image_edit_2511_fp8_e4m3fn_scaled_lightning.safetensors",
        "edit-2511",
        4,
        "fp8",
    ),
    *(
        Published(
            "QuantStack/Qwen-Image-Edit-2509-GGUF", f"Qwen-Image-Edit-2509-{kind}.gguf", "edit-2509"
        )
        for kind in ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
    ),
    Published("unsloth/Qwen-Image-Edit-2511-GGUF", "qwen-image-edit-2511-Q4_K_M.gguf", "edit-2511"),
)
REFUSED = tuple(_of_nunchaku("fp4"))  # for Blackwell's tensor cores alone
TEXT_ENCODERS = {
    ("Comfy-Org/Qwen-Image_ComfyUI", f"split_files/text_encoders/{name}.safetensors")
    for name in ("qwen_2.5_vl_7b_fp8_scaled", "qwen_2.5_vl_7b")
}
_BY_PLACE = {(known.repo, known.path): known for known in (*PUBLISHED, *REFUSED)}


def parse(text: str, variable: str = "CHECKPOINT") -> Path | HubFile | str:
    """What a variable names: a file of this machine, one of the hub, or an https URL.

    Raises:
        InvalidSettings: none of these, or a published file that this worker does not read.
    """
    if text.startswith("https://"):
        return text
    on_hub = _ON_HUB.fullmatch(text)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if on_hub and not path.is_absolute():
        _refuse_fp4(text, on_hub["repo"], on_hub["path"])
        return HubFile(on_hub["repo"], on_hub["path"], on_hub["revision"] or "main")
    raise InvalidSettings(
        f"{variable}={text!r} is no file of this machine, no https URL, and no file of the hub "
        "(owner/name:path or owner/name:path@revision)"
    )


def _refuse_fp4(text: str, repo: str, path: str) -> None:
    if _BY_PLACE.get((repo, path)) in REFUSED:
        raise InvalidSettings(
            f"CHECKPOINT={text} is in nunchaku's fp4, which this worker does not read; take the "
            f"one in int4: {repo}:{path.replace('svdq-fp4', 'svdq-int4')}"
        )


def published(source: Path | HubFile | str) -> Published | None:
    """What is known of it, if it is a file of the hub."""
    return _BY_PLACE.get((source.repo, source.path)) if isinstance(source, HubFile) else None


def is_text_encoder(source: Path | HubFile | str) -> bool:
    """Whether it is a published one."""
    return isinstance(source, HubFile) and (source.repo, source.path) in TEXT_ENCODERS


def model_of(settings: Settings) -> str:
    """`MODEL`; if that is auto, the model that a published `CHECKPOINT` belongs to.

    Raises:
        InvalidSettings: it, or a published text encoder, belongs to another one.
    """
    _check_text_encoder(settings)
    source = parse(settings.checkpoint) if settings.checkpoint else None
    if source is not None and is_text_encoder(source):
        raise InvalidSettings(
            f"CHECKPOINT={settings.checkpoint} is a text encoder; name it in "
            "TEXT_ENCODER_CHECKPOINT instead"
        )
    known = published(source) if source is not None else None
    if known is None:
        return settings.model
    if settings.model not in ("auto", known.model):
        raise InvalidSettings(
            f"MODEL={settings.model}, and CHECKPOINT={settings.checkpoint} belongs to "
            f"{known.model}; set MODEL={known.model}"
        )
    return known.model


def _check_text_encoder(settings: Settings) -> None:
    """That `TEXT_ENCODER_CHECKPOINT`, if it is set, names what may be one: before downloads."""
    text = settings.text_encoder_checkpoint
    if text is None:
        return
    source = parse(text, "TEXT_ENCODER_CHECKPOINT")
    if published(source):
        raise InvalidSettings(
            f"TEXT_ENCODER_CHECKPOINT={text} is a transformer; name it in CHECKPOINT instead"
        )
    if settings.model == "mini" and is_text_encoder(source):
        raise InvalidSettings(
            f"MODEL=mini, and TEXT_ENCODER_CHECKPOINT={text} belongs to the full-size models; "
            "drop one"
        )


def check_lightning(settings: Settings) -> None:
    """Whether settings ask for other Lightning than is merged in `CHECKPOINT`.

    Raises:
        InvalidSettings: they do.
    """
    steps = lightning_of(settings)
    if not steps:
        return
    what = f"Lightning for {steps} steps is merged in CHECKPOINT"
    if not settings.use_lightning_lora:
        raise InvalidSettings(f"USE_LIGHTNING_LORA=0, and {what}; drop one")
    is_set = "lightning_steps" in settings.model_fields_set
    if is_set and settings.lightning_steps != steps:
        raise InvalidSettings(
            f"LIGHTNING_STEPS={settings.lightning_steps}, and {what}; drop one, or correct "
            "CHECKPOINT_LIGHTNING"
        )


def lightning_of(settings: Settings) -> int:
    """Steps of the Lightning LoRA that is merged in `CHECKPOINT`; 0: none, as far as is known."""
    if settings.checkpoint is None:
        return 0
    if settings.checkpoint_lightning != "auto":
        return settings.checkpoint_lightning
    known = published(parse(settings.checkpoint))
    return known.lightning_steps if known else 0

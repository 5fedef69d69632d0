"""Published files that hold a transformer: where they are, whose they are, how they are sampled.

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
_BY_PLACE = {(known.repo, known.path): known for known in (*PUBLISHED, *REFUSED)}


def parse(text: str) -> Path | HubFile | str:
    """What `CHECKPOINT` names: a file of this machine, one of the hub, or an https URL.

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
        f"CHECKPOINT={text!r} is no file of this machine, no https URL, and no file of the hub "
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


def model_of(settings: Settings) -> str:
    """`MODEL`; if that is auto, the model that a published `CHECKPOINT` belongs to.

    Raises:
        InvalidSettings: it belongs to another one.
    """
    known = published(parse(settings.checkpoint)) if settings.checkpoint else None
    if known is None:
        return settings.model
    if settings.model not in ("auto", known.model):
        raise InvalidSettings(
            f"MODEL={settings.model}, and CHECKPOINT={settings.checkpoint} belongs to "
            f"{known.model}; set MODEL={known.model}"
        )
    return known.model


def lightning_of(settings: Settings) -> int:
    """Steps of the Lightning LoRA that is merged in `CHECKPOINT`; 0: none, as far as is known."""
    if settings.checkpoint is None:
        return 0
    if settings.checkpoint_lightning != "auto":
        return settings.checkpoint_lightning
    known = published(parse(settings.checkpoint))
    return known.lightning_steps if known else 0

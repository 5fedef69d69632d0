"""What this worker can serve: tables of models, their Lightning LoRAs, and how each is sampled.

To add a model, add a `ModelEntry`. Nothing here does any work or imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from image_worker.errors import ModelMismatch


@dataclass(frozen=True)
class PromptTemplate:
    """How a prompt is wrapped for the text encoder.

    The first `drop` tokens (the system message) are removed after encoding; `picture` goes before
    the prompt once per reference image, with its number, counted from 1.
    """

    text: str
    drop: int
    picture: str = ""

    def render(self, prompt: str, pictures: int) -> str:
        """The text that is tokenised, each picture a single `<|image_pad|>`."""
        shown = "".join(self.picture.format(number + 1) for number in range(pictures))
        return self.text.format(shown + prompt)


@dataclass(frozen=True)
class Sampler:
    """Parameters of the flow-matching Euler schedule (see `edit/schedule.py`).

    The shift is exp(mu), with mu linear in the number of target tokens between the two points
    (`base_tokens`, `base_shift`) and (`max_tokens`, `max_shift`).
    """

    base_shift: float
    max_shift: float
    base_tokens: int
    max_tokens: int
    terminal: float | None

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Sampler:
        """Reads a diffusers `scheduler_config.json`.

        Raises:
            ModelMismatch: the checkpoint asks for a scheduler that this worker does not implement.
        """
        expected = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
        }
        unwanted = (
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "invert_sigmas",
            "stochastic_sampling",
        )
        wrong = [
            f"{name}={config.get(name)!r} instead of {value!r}"
            for name, value in expected.items()
            if config.get(name) != value
        ] + [f"{name}=True" for name in unwanted if config.get(name)]
        if wrong:
            raise ModelMismatch(f"the checkpoint's scheduler is not supported: {', '.join(wrong)}")
        terminal = config.get("shift_terminal")
        return cls(
            base_shift=float(str(config["base_shift"])),
            max_shift=float(str(config["max_shift"])),
            base_tokens=int(str(config["base_image_seq_len"])),
            max_tokens=int(str(config["max_image_seq_len"])),
            terminal=float(str(terminal)) if terminal else None,
        )


# ModelTC/Qwen-Image-Lightning, generate_with_diffusers.py: a fixed shift of 3 for every size.
LIGHTNING_SAMPLER = Sampler(
    base_shift=math.log(3), max_shift=math.log(3), base_tokens=256, max_tokens=8192, terminal=None
)


@dataclass(frozen=True)
class HubFile:
    """One file on the Hugging Face hub, or, where `repo` is a folder, on disk."""

    repo: str
    path: str
    revision: str = "main"


@dataclass(frozen=True)
class ModelEntry:
    """One model: where it lives, what it accepts, how it is prompted and sampled.

    `area` is the picture area in pixels that references are resized to and that results have when
    the job names no size; `vision_area` is what the text encoder sees (None: the same picture);
    `ranges` is a file of activation ranges, which svdq is fitted to (see `model/ranges.py`).
    """

    name: str
    repo: str
    revision: str
    template: PromptTemplate
    max_images: int
    area: int = 1024 * 1024
    vision_area: int | None = None
    min_side: int = 256
    max_side: int = 2048
    steps: int = 40
    cfg_scale: float = 4.0
    lightning: Mapping[int, HubFile] = field(default_factory=dict)
    ranges: Path | None = None


_EDIT = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture,"
    " objects, background), then explain how the user's text instruction should alter or modify the"
    " image. Generate a new image that meets the user's requirements while maintaining consistency"
    " with the original input where appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_IMAGE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"

EDIT_PLUS = PromptTemplate(_EDIT, drop=64, picture="Picture {}: " + _PICTURE)
EDIT = PromptTemplate(_EDIT, drop=64, picture=_PICTURE)
TEXT_TO_IMAGE = PromptTemplate(_IMAGE, drop=34)

_LIGHTNING = "lightx2v/Qwen-Image-Lightning"
_LIGHTNING_COMMIT = "e74da8d4e71a54b341de86aa9f8d2509165aa513"
_MINIATURE = Path(__file__).parent / "miniature"


def _lightning(
    repo: str, pattern: str, revision: str = "main", versions: tuple[str, str] = ("V1.0", "V1.0")
) -> dict[int, HubFile]:
    return {
        steps: HubFile(repo, pattern.format(steps=steps, version=version), revision)
        for steps, version in zip((4, 8), versions, strict=True)
    }


CATALOG: Mapping[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        ModelEntry(
            name="edit-2509",
            repo="Qwen/Qwen-Image-Edit-2509",
            revision="d3968ef930e841f4c73640fb8afa3b306a78167e",
            template=EDIT_PLUS,
            max_images=4,
            vision_area=384 * 384,
            lightning=_lightning(
                _LIGHTNING,
                "Qwen-Image-Edit-2509/"
                "Qwen-Image-Edit-2509-Lightning-{steps}steps-{version}-bf16.safetensors",
                _LIGHTNING_COMMIT,
            ),
        ),
        ModelEntry(
            name="edit-2511",
            repo="Qwen/Qwen-Image-Edit-2511",
            revision="6f3ccc0b56e431dc6a0c2b2039706d7d26f22cb9",
            template=EDIT_PLUS,
            max_images=4,
            vision_area=384 * 384,
            lightning=_lightning(
                "lightx2v/Qwen-Image-Edit-2511-Lightning",
                "Qwen-Image-Edit-2511-Lightning-{steps}steps-{version}-bf16.safetensors",
            ),
        ),
        ModelEntry(
            name="edit",
            repo="Qwen/Qwen-Image-Edit",
            revision="ac7f9318f633fc4b5778c59367c8128225f1e3de",
            template=EDIT,
            max_images=1,
            steps=50,
            lightning=_lightning(
                _LIGHTNING,
                "Qwen-Image-Edit-Lightning-{steps}steps-{version}-bf16.safetensors",
                _LIGHTNING_COMMIT,
            ),
        ),
        ModelEntry(
            name="image",
            repo="Qwen/Qwen-Image",
            revision="75e0b4be04f60ec59a75f475837eced720f823b6",
            template=TEXT_TO_IMAGE,
            max_images=0,
            steps=50,
            lightning=_lightning(
                _LIGHTNING,
                "Qwen-Image-Lightning-{steps}steps-{version}-bf16.safetensors",
                _LIGHTNING_COMMIT,
                ("V2.0", "V2.0"),
            ),
        ),
        ModelEntry(
            name="image-2512",
            repo="Qwen/Qwen-Image-2512",
            revision="25468b98e3276ca6700de15c6628e51b7de54a26",
            template=TEXT_TO_IMAGE,
            max_images=0,
            steps=50,
            lightning=_lightning(
                "lightx2v/Qwen-Image-2512-Lightning",
                "Qwen-Image-2512-Lightning-{steps}steps-{version}-bf16.safetensors",
            ),
        ),
        ModelEntry(
            name="mini",
            repo=str(_MINIATURE),
            revision="",
            template=EDIT_PLUS,
            max_images=4,
            area=128 * 128,
            vision_area=128 * 128,
            min_side=64,
            max_side=512,
            steps=20,
            cfg_scale=1.0,  # edits with one right answer gain nothing from guidance
            lightning=_lightning(
                str(_MINIATURE), "loras/miniature-lightning-{steps}steps-{version}-bf16.safetensors"
            ),
            ranges=_MINIATURE / "svdq-ranges.safetensors",
        ),
    )
}


def choose(name: str, *, has_card: bool) -> ModelEntry:
    """The entry for the setting `MODEL`. Only "auto" looks at the machine."""
    if name == "auto":
        name = "edit-2509" if has_card else "mini"
    return CATALOG[name]

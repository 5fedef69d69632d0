"""The path of a model, walked once at cold start: from settings to a model that is ready to edit.

files → plan → text encoder → transformer (+ Lightning LoRA, merged) → VAE → sampler
"""

from __future__ import annotations

import dataclasses
import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from image_worker.catalog import LIGHTNING_SAMPLER, ModelEntry, Sampler
from image_worker.errors import DoesNotFit, InvalidSettings, ModelMismatch
from image_worker.model import files, weights
from image_worker.model.formats import FORMATS
from image_worker.model.lora import Lora
from image_worker.model.offload import Placement
from image_worker.model.placement import GIB, Hardware, Plan, Shape, Sizes, plan
from image_worker.model.vae import PictureVae
from image_worker.settings import Precision, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One step of the cold start; `gib` of weights kept, for steps that load some."""

    name: str
    seconds: float
    gib: float | None = None


@dataclass
class ColdStart:
    """What the cold start took: its steps, and peak memory in GiB once it was over."""

    steps: list[Step] = field(default_factory=list)
    peak_vram_gib: float | None = None
    peak_host_gib: float | None = None

    @contextmanager
    def step(self, name: str, size: int | None = None) -> Iterator[None]:
        """Times and logs one step, which keeps `size` bytes of weights."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        gib = None if size is None else round(size / GIB, 3)
        self.steps.append(Step(name, round(time.perf_counter() - start, 3), gib))
        what = name if gib is None else f"{name} ({gib:.2f} GiB)"
        log.info("cold start: %s in %.2f s; %s", what, self.steps[-1].seconds, memory_line())

    def finish(self) -> None:
        """Notes the peaks."""
        self.peak_host_gib = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        if torch.cuda.is_available():
            self.peak_vram_gib = round(torch.cuda.max_memory_reserved() / GIB, 2)


@dataclass(frozen=True)
class Model:
    """Everything that an edit needs, loaded and placed."""

    entry: ModelEntry
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    lightning_steps: int | None
    sampler: Sampler
    tokenizer: Any
    image_processor: Any
    text_encoder: Any
    transformer: Any
    vae: Any
    placement: Placement
    cold_start: ColdStart

    @property
    def steps(self) -> int:
        """Denoising steps of a job that names none."""
        return self.lightning_steps or self.entry.steps


def build(
    settings: Settings,
    entry: ModelEntry,
    hardware: Hardware,
    *,
    dtype: torch.dtype | None = None,
    first_edit: Callable[[Model], None] | None = None,
) -> Model:
    """Walks the path. `dtype` overrides the type to compute in (tests use float32).

    first_edit: tries the finished model; what cannot run fails here, before any job.

    Raises:
        OperatorError: files are missing or do not fit, a setting cannot be honoured, or the card
            is too small. Nothing is replaced by something lesser.
    """
    cold_start = ColdStart()
    with cold_start.step("find files"):
        folder = files.find_model(entry, settings)
        lora = _lightning(settings, entry)
    dtype = dtype or _compute_dtype(settings, hardware)
    configs = _read_configs(folder)
    sizes = _sizes(folder, settings, dtype)
    shape = _shape(entry, configs)
    decided = plan(settings, sizes, shape, hardware)
    log.info("plan: %s on %s: %s", entry.name, hardware.name, decided.describe())

    def load(decided: Plan) -> Model:
        bytes_kept = sizes[decided.precision]
        model = _load(
            settings, entry, hardware, folder, decided, bytes_kept, lora, dtype, cold_start
        )
        if first_edit is not None:
            with cold_start.step("first edit"):
                first_edit(model)
        cold_start.finish()
        return model

    try:
        try:
            return load(decided)
        except torch.OutOfMemoryError:
            if settings.cpu_offload != "auto" or decided.offload == "model":
                raise
            log.warning("%s does not fit after all: trying again with CPU offload", entry.name)
        torch.cuda.empty_cache()
        return load(dataclasses.replace(decided, offload="model"))
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"the card ran out of memory while starting at {decided.precision}; "
            "choose a smaller PRECISION_MODE or CPU_OFFLOAD=model, or free the card"
        ) from error


def _load(
    settings: Settings,
    entry: ModelEntry,
    hardware: Hardware,
    folder: Path,
    decided: Plan,
    sizes: Sizes,
    lora: Lora | None,
    dtype: torch.dtype,
    cold_start: ColdStart,
) -> Model:
    device = hardware.device
    placement = Placement(device, offload=decided.offload == "model")

    def load(name: str, module: nn.Module, **options: Any) -> nn.Module:
        with cold_start.step(f"load {name}", getattr(sizes, name)):
            storage = _storage(name, decided.precision, settings, dtype)
            found = files.weight_files(folder / name)
            weights.load(module, found, storage, device, label=name, **options)
            if isinstance(module, PictureVae):
                module.fold()
            module.eval().to(device)  # buffers, which no checkpoint holds
            placement.add(name, module)
        return module

    text_encoder = load("text_encoder", _empty_text_encoder(folder), rename=text_encoder_name)
    transformer = load("transformer", _empty(QwenImageTransformer2DModel, folder), lora=lora)
    vae = load("vae", _empty(PictureVae, folder))
    scheduler = files.read_json(folder / "scheduler" / "scheduler_config.json")
    return Model(
        entry=entry,
        plan=decided,
        device=device,
        dtype=dtype,
        lightning_steps=settings.lightning_steps if lora else None,
        sampler=LIGHTNING_SAMPLER if lora else Sampler.from_config(scheduler),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
        if entry.max_images
        else None,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        placement=placement,
        cold_start=cold_start,
    )


def _lightning(settings: Settings, entry: ModelEntry) -> Lora | None:
    if not settings.use_lightning_lora:
        return None
    file = entry.lightning.get(settings.lightning_steps)
    if file is None:
        raise InvalidSettings(
            f"{entry.name} has no Lightning LoRA for {settings.lightning_steps} steps; "
            "set USE_LIGHTNING_LORA=0 to go without"
        )
    return Lora.read(files.find_adapter(file, settings))


def _compute_dtype(settings: Settings, hardware: Hardware) -> torch.dtype:
    if settings.bnb_compute == "fp16":
        return torch.float16
    if not hardware.has_bf16:
        log.warning("%s has no bfloat16: computing in float16", hardware.name)
        return torch.float16
    return torch.bfloat16


def _storage(
    name: str, precision: Precision, settings: Settings, dtype: torch.dtype
) -> weights.Storage:
    """Which layers of a component are quantised.

    Left alone: what is small and feels rounding most (input and output layers, the vision tower,
    the VAE), and the first block's `img_mod`, as published NF4 checkpoints of this model do.
    """
    text_only = settings.quantize_components == "text"

    def stores(path: str) -> bool:
        if name == "text_encoder":
            return path.startswith("language_model.layers.")
        if name == "transformer" and not text_only:
            kept = path.startswith("transformer_blocks.0.img_mod.")
            return path.startswith("transformer_blocks.") and not kept
        return False

    return weights.Storage(dtype, FORMATS[precision], stores)


def text_encoder_name(name: str) -> str | None:
    """The name in `Qwen2_5_VLModel` of a tensor of either published layout; None: not needed.

    Only hidden states are used, so the language model's output layer stays on disk.
    """
    if name.startswith("lm_head."):
        return None
    bare = name.removeprefix("model.")
    if bare.startswith(("visual.", "language_model.")):
        return bare
    return f"language_model.{bare}"


def _empty(kind: Any, folder: Path) -> nn.Module:
    """The component with its parameters on the meta device."""
    name = "vae" if kind is PictureVae else "transformer"
    with init_empty_weights(include_buffers=False):
        module: nn.Module = kind.from_config(kind.load_config(folder / name))
    return module


def _empty_text_encoder(folder: Path) -> nn.Module:
    config = Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder")
    with init_empty_weights(include_buffers=False):
        module: nn.Module = Qwen2_5_VLModel(config)
    return module


def _read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The components' configurations, checked to be of the classes that this worker runs."""
    expected = {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }
    configs = {}
    for name, kind in expected.items():
        configs[name] = files.read_json(folder / name / "config.json")
        found = configs[name].get("_class_name")
        if found != kind:
            raise ModelMismatch(f"{name} of the model is a {found}; this worker runs {kind}")
    return configs


def _sizes(folder: Path, settings: Settings, dtype: torch.dtype) -> dict[Precision, Sizes]:
    def size(name: str, precision: Precision) -> int:
        rename = text_encoder_name if name == "text_encoder" else lambda tensor: tensor
        storage = _storage(name, precision, settings, dtype)
        return weights.stored_bytes(files.weight_files(folder / name), storage, rename)

    return {
        precision: Sizes(**{name: size(name, precision) for name in files.COMPONENTS})
        for precision in FORMATS
    }


def _shape(entry: ModelEntry, configs: dict[str, dict[str, Any]]) -> Shape:
    transformer = configs["transformer"]
    tokens_per_picture = entry.area // 256  # 8× by the VAE and 2× by packing, per side
    pictures = 2 if entry.max_images else 1
    return Shape(
        width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
        zero_cond_t=bool(transformer.get("zero_cond_t", False)),
        vae_base=configs["vae"]["base_dim"],
        tokens=pictures * tokens_per_picture + 256,
        pixels=entry.area,
    )


def memory_line() -> str:
    """Memory in use, in words."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = f"host peak {host:.1f} GiB"
    if torch.cuda.is_available():
        line += f", card {torch.cuda.memory_allocated() / GIB:.1f} GiB"
    return line

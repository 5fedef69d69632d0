"""The worker: holds the model, and takes a job from JSON to reply."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image

from image_worker.catalog import ModelEntry, choose
from image_worker.edit import conditions, sizes
from image_worker.edit.decode import decode
from image_worker.edit.denoise import Progress, denoise, start
from image_worker.edit.schedule import check_steps
from image_worker.errors import InternalError, InvalidRequest, OutOfMemory, WorkerError
from image_worker.job.images import load_images
from image_worker.job.request import EditRequest, summary
from image_worker.job.response import encode_image, failure, size_warnings, success
from image_worker.model.build import Model, build
from image_worker.model.placement import detect_hardware
from image_worker.settings import Settings

log = logging.getLogger(__name__)


class Worker:
    """One model on one card. `run` may be called from several threads; the card is used by one."""

    def __init__(self, settings: Settings, model: Model) -> None:
        self.settings = settings
        self.model = model
        self._card = threading.Lock()
        self._cold_start: dict[str, Any] | None = asdict(model.cold_start)

    @classmethod
    def from_settings(cls, settings: Settings) -> Worker:
        """The cold start, up to a first small edit that shows that the model runs.

        Raises:
            OperatorError: the settings cannot be honoured on this machine.
        """
        hardware = detect_hardware(settings)
        entry = choose(settings.model, has_card=hardware.free is not None)
        if settings.model == "auto":
            log.info("MODEL=auto: serving %s on %s", entry.name, hardware.name)
        if hardware.free is None and (settings.gpu_max_gib or settings.cpu_offload == "model"):
            log.warning("no CUDA card: GPU_MAX_GIB and CPU_OFFLOAD have no effect")
        return cls(settings, build(settings, entry, hardware, first_edit=warm_up))

    @property
    def entry(self) -> ModelEntry:
        """The model's entry in the catalogue."""
        return self.model.entry

    def run(self, job: Mapping[str, Any], progress: Progress | None = None) -> dict[str, Any]:
        """One job, `{"id", "input"}`, to its reply. Never raises: errors are replies, too."""
        job_id = str(job.get("id", "local"))[:100]
        try:
            request = EditRequest.parse(job.get("input"), self.entry)
            log.info("job %s: %s", job_id, summary(request))
            reply = self._edit(request, progress)
            log.info("job %s: done, %s", job_id, reply["timings"])
            return reply
        except WorkerError as error:
            log.warning("job %s: %s: %s", job_id, error.type, error, exc_info=error.__cause__)
            return failure(error)
        except Exception:  # the one catch-all: details to the log, none to the caller
            log.exception("job %s: unforeseen error", job_id)
            return failure(InternalError("the worker failed; its log has the details"))

    def _edit(self, request: EditRequest, progress: Progress | None) -> dict[str, Any]:
        clock = _Clock()
        self._check(request)
        with clock("fetch", on_card=False):
            images = load_images(request.sources)
        size = self._size(request, images)
        with self._card, _memory_errors(*size):
            results = self._make(request, images, size, clock, progress)
            cold_start = self._once()
        files = [
            encode_image(result, request.output_format, request.encoder_quality)
            for result in results
        ]
        return success(files, self._facts(request, size, files) | clock.facts() | cold_start)

    def _check(self, request: EditRequest) -> None:
        """What only the model can tell of a request, before anything is fetched."""
        check_steps(self.model.sampler, self._steps(request))
        conditions.check_prompt(self.model, request.prompt, "prompt")
        if request.negative_prompt is not None:
            conditions.check_prompt(self.model, request.negative_prompt, "negative_prompt")

    def _make(
        self,
        request: EditRequest,
        images: list[Image.Image],
        size: tuple[int, int],
        clock: _Clock,
        progress: Progress | None,
    ) -> list[Image.Image]:
        """The card's part: conditions, latents, pictures."""
        cfg_scale = self._cfg_scale(request)
        with clock("encode"):
            negative = (request.negative_prompt or " ") if cfg_scale > 1 else None
            encoded = conditions.encode(self.model, request.prompt, negative, images)
        with clock("denoise"):
            steps = self._steps(request)
            pictures = [
                start(self.model, encoded, size, seed=seed, steps=steps, cfg_scale=cfg_scale)
                for seed in request.seeds
            ]
            denoise(self.model, pictures, progress)
        with clock("decode"):
            return [decode(self.model, picture) for picture in pictures]

    def _facts(
        self, request: EditRequest, size: tuple[int, int], files: list[str]
    ) -> dict[str, Any]:
        """How the pictures were made."""
        return {
            "prompt": request.prompt,
            "seed": request.seed,
            "seeds": request.seeds,
            "num_inference_steps": self._steps(request),
            "lightning_enabled": self.model.lightning_steps is not None,
            "true_cfg_scale": self._cfg_scale(request),
            "width": size[0],
            "height": size[1],
            "output_format": request.output_format,
            "model": self.entry.name,
            "precision": self.model.plan.precision,
            "warnings": self._warnings(request) + size_warnings(files),
        }

    def _steps(self, request: EditRequest) -> int:
        return request.num_inference_steps or self.model.steps

    def _cfg_scale(self, request: EditRequest) -> float:
        if request.true_cfg_scale is not None:
            return request.true_cfg_scale
        if self.settings.default_cfg_scale is not None:
            return self.settings.default_cfg_scale
        return 1.0 if self.model.lightning_steps else self.entry.cfg_scale

    def _size(self, request: EditRequest, images: list[Image.Image]) -> tuple[int, int]:
        ratio = images[-1].width / images[-1].height if images else 1.0
        width, height = sizes.output_size(self.entry.area, ratio, request.width, request.height)
        for name, side in (("width", width), ("height", height)):
            if not self.entry.min_side <= side <= self.entry.max_side:
                raise InvalidRequest(
                    f"the last picture's shape asks for a {width}x{height} result, and sides must "
                    f"be {self.entry.min_side} to {self.entry.max_side}; give width and height",
                    field=name,
                )
        return width, height

    def _warnings(self, request: EditRequest) -> list[str]:
        """What was done as asked but is likely not what was meant."""
        warnings = []
        steps, cfg_scale = self._steps(request), self._cfg_scale(request)
        trained = self.model.lightning_steps
        if trained and cfg_scale > 1:
            warnings.append("Lightning is made for true_cfg_scale 1; more may burn the colours")
        if trained and steps != trained:
            warnings.append(f"Lightning is made for {trained} steps; this job had {steps}")
        if request.negative_prompt and cfg_scale == 1:
            warnings.append("negative_prompt has no effect at true_cfg_scale 1")
        return warnings

    def _once(self) -> dict[str, Any]:
        """Facts of the cold start, for the first reply only."""
        facts, self._cold_start = self._cold_start, None
        return {"cold_start": facts} if facts else {}


def warm_up(model: Model) -> None:
    """A small edit of a grey picture in two steps: what cannot run fails here, before any job."""
    side = model.entry.min_side
    images = [Image.new("RGB", (side, side), "gray")] if model.entry.max_images else []
    encoded = conditions.encode(model, "warm up", None, images)
    picture = start(model, encoded, (side, side), seed=0, steps=2, cfg_scale=1.0)
    denoise(model, [picture])
    decode(model, picture)


class _Clock:
    """Seconds per stage, and in all."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, *, on_card: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if on_card and torch.cuda.is_available():
            torch.cuda.synchronize()  # or the next stage would be billed for this one's work
        self._stages[stage] = time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        stages = self._stages | {"total": time.perf_counter() - self._start}
        return {"timings": {stage: round(seconds, 4) for stage, seconds in stages.items()}}


@contextmanager
def _memory_errors(width: int, height: int) -> Iterator[None]:
    """A job too large for the card is that job's error; its memory is given back."""
    try:
        yield
    except RuntimeError as error:
        # torch's own error, and cuBLAS' and the driver's, which have no type of their own
        if not re.search(r"out of memory|ALLOC_FAILED", str(error)):
            raise
        torch.cuda.empty_cache()
        raise OutOfMemory(
            f"{width}x{height} with these pictures needs more memory than the card has left; "
            "use a smaller size, fewer pictures, or num_images 1"
        ) from error

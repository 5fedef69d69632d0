"""The worker: holds the model, and takes a job from JSON to reply."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from image_worker.catalog import ModelEntry, choose
from image_worker.checkpoints import model_of
from image_worker.edit import conditions, sizes
from image_worker.edit.conditions import Reference
from image_worker.edit.decode import decode
from image_worker.edit.denoise import Progress, denoise, start
from image_worker.edit.fitting import check_fits
from image_worker.edit.schedule import check_steps
from image_worker.engine import Engine
from image_worker.errors import CardLost, InternalError, InvalidRequest, WorkerError
from image_worker.job.images import load_images
from image_worker.job.request import EditRequest, named, summary
from image_worker.job.response import Outlet, failure, make_reply
from image_worker.job.storage import Storage
from image_worker.lora_files import folder_of
from image_worker.loras import Loras
from image_worker.model.build import Model, build
from image_worker.model.hardware import detect_hardware
from image_worker.orders import Made, Order
from image_worker.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
_PREPARING = 32  # threads: most of them wait for pictures from elsewhere
_FINISHING = 4  # threads: they compress pictures


class Worker:
    """One model on one card, for any number of jobs at a time.

    The event loop only passes jobs on: pictures are fetched, decoded and encoded on threads, and
    the card has a thread of its own (`engine.py`).
    """

    def __init__(self, settings: Settings, model: Model) -> None:
        self.settings = settings
        self.model = model
        self.loras = Loras(settings, model)
        self.engine = Engine(model, settings.batch_size, settings.batch_timeout_ms / 1000)
        self._preparing = ThreadPoolExecutor(_PREPARING, "preparing")
        self._finishing = ThreadPoolExecutor(_FINISHING, "finishing")
        self._cold_start: dict[str, Any] | None = asdict(model.cold_start)

    @classmethod
    def from_settings(cls, settings: Settings) -> Worker:
        """The cold start, up to a first small edit that shows that the model runs.

        Raises:
            OperatorError: the settings cannot be honoured on this machine.
        """
        Storage.from_settings(settings)  # a wrong one is found before any job
        folder_of(settings)
        hardware = detect_hardware(settings)
        entry = choose(model_of(settings), has_card=hardware.free is not None)
        if settings.model == "auto":
            log.info("MODEL=auto: serving %s on %s", entry.name, hardware.name)
        if hardware.free is None and (settings.gpu_max_gib or settings.cpu_offload == "stream"):
            log.warning("no CUDA card: GPU_MAX_GIB and CPU_OFFLOAD have no effect")
        return cls(settings, build(settings, entry, hardware, first_edit=warm_up))

    @property
    def entry(self) -> ModelEntry:
        """The model's entry in the catalogue."""
        return self.model.entry

    @property
    def broken(self) -> bool:
        """Whether the process must be replaced: its card is lost, and every job would fail."""
        return self.engine.lost

    def close(self) -> None:
        """Stops the threads. Jobs that are not done are cancelled."""
        self.engine.close()
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._finishing.shutdown(wait=False, cancel_futures=True)

    async def run(
        self,
        job: Mapping[str, Any],
        progress: Progress | None = None,
        previews: Callable[[Image.Image], None] | None = None,
    ) -> dict[str, Any]:
        """One job, `{"id", "input", "s3Config"}`, to its reply. Errors are replies, too.

        Cancelling it takes the job off the card between two steps. progress(step, of) and
        previews(picture) are called on the event loop after each step.
        """
        job_id = str(job.get("id", "local"))[:100]
        try:
            reply = await self._edit(job_id, job, progress, previews)
            log.info("job %s: done, %s", job_id, reply["timings"])
            return reply
        except WorkerError as error:
            log.warning("job %s: %s: %s", job_id, error.type, error, exc_info=error.__cause__)
            return failure(error)
        except asyncio.CancelledError:
            log.info("job %s: cancelled", job_id)
            raise
        except Exception:  # the one catch-all: details to the log, none to the caller
            log.exception("job %s: unforeseen error", job_id)
            return failure(InternalError("the worker failed; its log has the details"))

    def run_blocking(
        self, job: Mapping[str, Any], progress: Progress | None = None
    ) -> dict[str, Any]:
        """`run`, for callers without an event loop."""
        return asyncio.run(self.run(job, progress))

    async def _edit(
        self,
        job_id: str,
        job: Mapping[str, Any],
        progress: Progress | None,
        previews: Callable[[Image.Image], None] | None,
    ) -> dict[str, Any]:
        clock = _Clock()
        if self.broken:
            raise CardLost("this worker is being replaced; try again on another one")
        with self.engine.announced():
            request, order, outlet = await self._on(self._preparing, self._prepare, job_id, job)
            clock.passed("fetch")
            watcher = _watcher(asyncio.get_running_loop(), progress, previews)
            order = replace(order, watcher=watcher, previews=previews is not None)
            card = self.engine.submit(order)
        made = await asyncio.wrap_future(card)
        clock.add(made.seconds)
        facts = self._facts(request, order, made) | clock.facts() | self._once()
        reply = await self._on(self._finishing, _finish, made, request, facts, outlet)
        clock.passed("file")
        return reply | clock.facts()

    async def _on(self, pool: ThreadPoolExecutor, work: Callable[..., T], *given: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *given)

    def _prepare(self, job_id: str, job: Mapping[str, Any]) -> tuple[EditRequest, Order, Outlet]:
        """All that comes before the card."""
        request = EditRequest.parse(job.get("input"), self.entry)
        log.info("job %s: %s", job_id, summary(request))
        self._check(request)
        outlet = Outlet.of(self.settings, job.get("s3Config"), job_id)
        if self.settings.runpod_webhook_get_job is None:
            outlet = replace(outlet, max_bytes=None)  # only the queue drops large replies
        style = self.loras.style(request.loras or ())
        references = load_images(request.sources, partial(conditions.as_reference, self.model))
        cfg_scale = self._cfg_scale(request)
        negative = (request.negative_prompt or " ") if cfg_scale > 1 else None
        prepared = conditions.prepare(self.model, request.prompt, negative, references)
        size = self._size(request, references)
        check_fits(self.model, prepared, size, style.nbytes if style else 0)
        order = Order(prepared, size, request.seeds, self._steps(request), cfg_scale, style)
        return request, order, outlet

    def _check(self, request: EditRequest) -> None:
        """What only the model can tell of a request, before anything is fetched."""
        check_steps(self.model.sampler, self._steps(request))
        conditions.check_prompt(self.model, request.prompt, "prompt")
        if request.negative_prompt is not None:
            conditions.check_prompt(self.model, request.negative_prompt, "negative_prompt")

    def _facts(self, request: EditRequest, order: Order, made: Made) -> dict[str, Any]:
        """How the pictures were made."""
        width, height = order.size
        return {
            "prompt": request.prompt,
            "seed": request.seed,
            "seeds": request.seeds,
            "num_inference_steps": order.steps,
            "lightning_enabled": self.model.lightning_steps is not None,
            "true_cfg_scale": order.cfg_scale,
            "loras": named(request),
            "width": width,
            "height": height,
            "output_format": request.output_format,
            "model": self.entry.name,
            "precision": self.model.weights,
            "batch_size": round(made.together, 2),
            "warnings": self._warnings(request),
        }

    def _steps(self, request: EditRequest) -> int:
        return request.num_inference_steps or self.model.steps

    def _cfg_scale(self, request: EditRequest) -> float:
        if request.true_cfg_scale is not None:
            return request.true_cfg_scale
        if self.settings.default_cfg_scale is not None:
            return self.settings.default_cfg_scale
        return 1.0 if self.model.lightning_steps else self.entry.cfg_scale

    def _size(self, request: EditRequest, references: list[Reference]) -> tuple[int, int]:
        ratio = references[-1].ratio if references else 1.0
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
    """A small edit of a grey picture in two steps: what cannot run fails here, before any job.

    The usual schedule's modulation is made here, too, so that the first job finds it.
    """
    side = model.entry.min_side
    images = [Image.new("RGB", (side, side), "gray")] if model.entry.max_images else []
    encoded = conditions.encode(model, "warm up", None, images)
    picture = start(model, encoded, (side, side), seed=0, steps=2, cfg_scale=1.0)
    denoise(model, [picture])
    decode(model, picture)
    usual = sizes.fit_area(model.entry.area, 1.0)
    start(model, encoded, usual, seed=0, steps=model.steps, cfg_scale=1.0)


def _finish(
    made: Made, request: EditRequest, facts: Mapping[str, Any], outlet: Outlet
) -> dict[str, Any]:
    """All that comes after the card."""
    pictures = [Image.fromarray(pixels.numpy()) for pixels in made.pixels]
    return make_reply(pictures, request, facts, outlet)


class _Clock:
    """Seconds per stage, one after the other, and in all."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def passed(self, stage: str) -> None:
        """The time since the last stage was that of `stage`."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now

    def add(self, seconds: Mapping[str, float]) -> None:
        """Stages that were measured elsewhere, up to now."""
        self.seconds |= seconds
        self._last = time.perf_counter()

    def facts(self) -> dict[str, Any]:
        stages = self.seconds | {"total": time.perf_counter() - self._start}
        return {"timings": {stage: round(seconds, 4) for stage, seconds in stages.items()}}


def _watcher(
    loop: asyncio.AbstractEventLoop,
    progress: Progress | None,
    previews: Callable[[Image.Image], None] | None,
) -> Callable[[int, int, Tensor | None], None]:
    """What the engine calls on its thread; the caller's functions run on the event loop."""

    def tell(step: int, of: int, pixels: Tensor | None) -> None:
        if progress:
            loop.call_soon_threadsafe(progress, step, of)
        if previews and pixels is not None:
            loop.call_soon_threadsafe(previews, Image.fromarray(pixels.numpy()))

    return tell

"""One way of `compare`, in a process of its own, with its settings in the environment.

Orders come by the standard input and answers go to the standard output, a line of JSON each:

    {"do": "machine"}                                        facts of the machine
    {"do": "start", "begun": …, "loras": […]}                facts of the cold start
    {"do": "edit", "input": {…}, "picture": path or null}    one job's seconds and memory
    {"do": "card_time", "input": {…}}                        where its time goes, by kernels
    {"do": "kernels", "shape": {…}, "rounds": n}             the fused kernels' milliseconds

An answer {"error": {"type", "message"}} says why there is none. It ends with its input.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_worker.errors import InternalError, WorkerError

if TYPE_CHECKING:
    from image_worker.settings import Settings
    from image_worker.worker import Worker

log = logging.getLogger(__name__)


def main() -> None:
    """Answers orders until there are no more."""
    # Whatever libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    child = Child()
    for line in sys.stdin:
        answers.write(json.dumps(child.answer(json.loads(line))) + "\n")
        answers.flush()
    child.close()


class JobFailed(Exception):
    """error: of the job's reply."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.error = error


class Child:
    """What one process knows: its worker, once that was started."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def answer(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """What was asked for, or the error that prevented it."""
        try:
            found: dict[str, Any] = getattr(self, f"_{order['do']}")(order)
        except WorkerError as error:
            return {"error": error.reply()}
        except JobFailed as failed:
            return {"error": failed.error}
        except Exception as error:  # this process' catch-all: the others go on
            log.exception("unforeseen error")
            return {"error": InternalError(f"{type(error).__name__}: {error}").reply()}
        return found

    def close(self) -> None:
        """Ends the worker's threads."""
        if self._worker is not None:
            self._worker.close()

    def _machine(self, order: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        from image_worker.commands.compare.machine import facts

        return facts()

    def _start(self, order: Mapping[str, Any]) -> dict[str, Any]:
        from image_worker.serve.main import set_up_logging
        from image_worker.serve.process import favour_event_loop, prepare_process
        from image_worker.settings import Settings

        prepare_process()
        settings = Settings.from_env()
        set_up_logging(settings)
        import image_worker.worker  # noqa: F401  (timed by itself)

        imported = time.time() - order["begun"]
        self._worker = worker = start(settings, [Path(path) for path in order["loras"]])
        seconds = time.time() - order["begun"]
        gc.enable()
        favour_event_loop()
        model = worker.model
        steps = [{"name": "process and imports", "seconds": round(imported, 3)}]
        steps += [{"name": step.name, "seconds": step.seconds} for step in model.cold_start.steps]
        return {
            "seconds": seconds,
            "steps": steps,
            "model": model.entry.name,
            "weights": model.weights,
            "plan": model.plan.describe(),
            "confined": _is_confined(worker),
            "shape": _shape(worker),
            **memory(),
        }

    def _edit(self, order: Mapping[str, Any]) -> dict[str, Any]:
        import pybase64

        clock = time.perf_counter()
        reply = self._reply(order)
        seconds = time.perf_counter() - clock
        if order["picture"]:
            Path(order["picture"]).write_bytes(pybase64.b64decode(reply["images"][0]))
        known = ("timings", "width", "height", "warnings")
        steps = reply["num_inference_steps"]
        facts = {name: reply[name] for name in known}
        return {"seconds": seconds, "steps": steps, **facts, **memory()}

    def _card_time(self, order: Mapping[str, Any]) -> dict[str, Any]:
        from image_worker.commands.compare.card_time import measure

        return measure(lambda: self._reply(order))

    def _reply(self, order: Mapping[str, Any]) -> dict[str, Any]:
        if self._worker is None:
            raise InternalError("the worker was not started")
        reply = self._worker.run_blocking({"id": "compare", "input": order["input"]})
        if "error" in reply:
            raise JobFailed(reply["error"])
        return reply

    def _kernels(self, order: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        from image_worker.commands.compare.kernels import measure

        if not torch.cuda.is_available():
            return {"problem": "no card"}
        return measure(order["shape"], torch.device("cuda"), order["rounds"])


def start(settings: Settings, loras: list[Path]) -> Worker:
    """The worker, with these merged on top of what the settings ask for.

    No setting names LoRAs of one's own yet; where one does, this becomes `Worker.from_settings`.

    Raises:
        OperatorError: as of that.
    """
    from image_worker.catalog import choose
    from image_worker.checkpoints import model_of
    from image_worker.model.build import build
    from image_worker.model.hardware import detect_hardware
    from image_worker.worker import Worker, warm_up

    if not loras:
        return Worker.from_settings(settings)
    hardware = detect_hardware(settings)
    entry = choose(model_of(settings), has_card=hardware.free is not None)
    model = build(settings, entry, hardware, loras=loras, first_edit=warm_up)
    return Worker(settings, model)


def memory() -> dict[str, int | None]:
    """Bytes: the most that torch reserved of the card, what is free of it, the host's peak."""
    import torch

    from image_worker.model.cold_start import host_peak_gib

    has_card = torch.cuda.is_available()
    return {
        "card": torch.cuda.max_memory_reserved() if has_card else None,
        "card_free": torch.cuda.mem_get_info()[0] if has_card else None,
        "host": int(host_peak_gib() * 2**30),
    }


def _is_confined(worker: Worker) -> bool:
    """Whether weights pass through the card, or usual pictures go through the VAE in tiles."""
    plan, area = worker.model.plan, worker.model.entry.area
    return bool(plan.streamed) or (plan.max_pixels is not None and plan.max_pixels < area)


def _shape(worker: Worker) -> dict[str, int]:
    """Of the transformer's tensors in a usual job: what its kernels are timed on."""
    config, entry = worker.model.transformer.config, worker.model.entry
    pictures = 2 if entry.max_images else 1
    return {
        "heads": config.num_attention_heads,
        "size": config.attention_head_dim,
        "text_tokens": 128,
        "image_tokens": pictures * entry.area // 256,
    }


if __name__ == "__main__":
    main()

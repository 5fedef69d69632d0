"""The command line of `handler.py`: decides where jobs come from."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_worker.errors import InvalidRequest, WorkerError
from image_worker.serve.process import favour_event_loop, prepare_process
from image_worker.settings import Settings

if TYPE_CHECKING:  # it imports torch
    from image_worker.worker import Worker

TEST_INPUT = Path("test_input.json")
log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves the queue where there is one; otherwise runs one job. Returns the exit status."""
    options, for_sdk = _parser().parse_known_args(arguments)
    prepare_process()
    try:
        settings = Settings.from_env()
        set_up_logging(settings)
        job = _local_job(options.test_input, settings, for_sdk)
        # After the settings: a bad one should not wait for seconds of imports.
        from image_worker.worker import Worker

        if job is None:
            _import_on_thread(_way_in(settings))
        worker = Worker.from_settings(settings)
    except WorkerError as error:
        log.debug("the start failed", exc_info=error)
        sys.stderr.write(f"error: {error.type}: {error}\n")
        return 2
    except Exception:  # the start's own catch-all: no job has been taken
        log.exception("error: the worker could not start")
        return 2
    finally:
        gc.enable()
    if job is not None:
        from image_worker.serve.command import run_one

        return run_one(worker, job, options.output_folder)
    favour_event_loop()
    serve: Callable[[Worker, Settings], int] = import_module(_way_in(settings)).serve
    return serve(worker, settings)


def _way_in(settings: Settings) -> str:
    """The module that jobs come in by."""
    name = "http" if settings.standalone_mode else "runpod_queue"
    return f"image_worker.serve.{name}"


def _import_on_thread(module: str) -> None:
    """It takes a second or two, which the model's weights take to be read, too."""
    threading.Thread(target=import_module, args=[module], name="imports").start()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="handler.py",
        description="Edits images with Qwen-Image. Settings come from environment variables.",
        epilog="Other options (--rp_log_level, --rp_serve_api, …) go to the RunPod SDK.",
    )
    parser.add_argument(
        "--test_input",
        metavar="JSON",
        help='run one job, {"input": {"prompt": …, "image": …}}, and exit; without a queue the '
        "default is test_input.json",
    )
    parser.add_argument(
        "--output_folder",
        type=Path,
        default=Path("generated-images"),
        help="where a local job's pictures go (default: generated-images)",
    )
    return parser


def _local_job(
    test_input: str | None, settings: Settings, for_sdk: Sequence[str]
) -> dict[str, Any] | None:
    """The job to run here, or None to serve."""
    if test_input is None:
        serves = settings.runpod_webhook_get_job or settings.standalone_mode
        if serves or "--rp_serve_api" in for_sdk:
            return None
        if not TEST_INPUT.is_file():
            raise InvalidRequest("there is no queue, no --test_input and no test_input.json")
        log.info("no queue: running %s", TEST_INPUT)
    try:
        job = json.loads(TEST_INPUT.read_text() if test_input is None else test_input)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the job is not JSON: {error}") from None
    if not isinstance(job, dict) or "input" not in job:
        raise InvalidRequest('the job must be a JSON object with "input"')
    return job


def set_up_logging(settings: Settings) -> None:
    """To the standard error, without what other libraries say for themselves."""
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    for noisy in ("httpx", "httpx2", "urllib3", "botocore", "PIL", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # At import it warns of an optional kernel for CPUs that is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

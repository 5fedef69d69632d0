"""`python -m image_worker calibrate`: activation ranges for svdq, recorded while jobs run."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_worker.commands.edit import failed, for_files, start
from image_worker.errors import InvalidRequest, WorkerError

if TYPE_CHECKING:
    from image_worker.settings import Settings
    from image_worker.worker import Worker

_ABOUT = (
    "Runs jobs, and records how large the inputs of the transformer's layers are: SVDQ_RANGES then "
    "names the file for PRECISION_MODE=svdq. A few jobs of the kind to be served will do. Their "
    "pictures are not kept. Settings come from environment variables, as for the worker; products "
    "are in the type of BNB_COMPUTE, whatever COMPUTE is."
)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its options."""
    command = commands.add_parser(
        "calibrate", help="record activation ranges for svdq on a few jobs", description=_ABOUT
    )
    command.add_argument(
        "jobs",
        nargs="+",
        type=Path,
        metavar="JOBS",
        help="JSON files, each with a job as test_input.json has it, or a list of jobs",
    )
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the .safetensors file to write; one of that name is replaced",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the jobs. Returns the exit status: 1 if one is wrong or failed, 2 without a worker."""
    from image_worker.serve.main import set_up_logging
    from image_worker.serve.process import prepare_process
    from image_worker.settings import Settings

    prepare_process()
    try:
        try:
            settings = for_recording(Settings.from_env())
            set_up_logging(settings)
        except WorkerError as error:
            return failed(error, 2)
        try:
            _check_output(options.output)
            jobs = [job for path in options.jobs for job in read_jobs(path)]
            _check(jobs, settings)
        except WorkerError as error:
            return failed(error, 1)
        return _start_and_record(settings, jobs, options.output)
    finally:
        gc.enable()


def for_recording(settings: Settings) -> Settings:
    """The settings of a worker whose products read what is recorded, before it is rounded.

    It keeps no prepared weights unless that is asked for, since it is not what will serve, and
    needs no ranges: they may be the ones to be written.
    """
    keep = "0" if settings.keep_prepared == "auto" else settings.keep_prepared
    update = {"compute": "bf16", "keep_prepared": keep, "svdq_ranges": None}
    return for_files(settings).model_copy(update=update)


def read_jobs(path: Path) -> list[dict[str, Any]]:
    """The jobs of a file, each with its "input" alone.

    Raises:
        InvalidRequest: it cannot be read, or has something else; says where.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from None
    jobs = found if isinstance(found, list) else [found]
    if not jobs:
        raise InvalidRequest(f"{path} has no jobs")
    for number, job in enumerate(jobs, start=1):
        if not isinstance(job, dict) or "input" not in job:
            raise InvalidRequest(f'{path}: job {number} is no JSON object with "input"')
    return [
        {"id": f"{path.name}, job {number}", "input": job["input"]}
        for number, job in enumerate(jobs, start=1)
    ]


def _check_output(path: Path) -> None:
    """Before anything runs, which may take long."""
    if path.suffix != ".safetensors":
        raise InvalidRequest(f"--output {path} is no name of a .safetensors file")
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidRequest(f"--output {path} is not in a folder, or is one itself")


def _check(jobs: list[dict[str, Any]], settings: Settings) -> None:
    """What the worker would refuse after its start, which takes long."""
    import torch

    from image_worker.catalog import choose
    from image_worker.checkpoints import model_of
    from image_worker.job.request import EditRequest

    entry = choose(model_of(settings), has_card=torch.cuda.is_available())
    for job in jobs:
        try:
            EditRequest.parse(job["input"], entry)
        except InvalidRequest as error:
            raise InvalidRequest(f"{job['id']}: {error}") from None


def _start_and_record(settings: Settings, jobs: list[dict[str, Any]], target: Path) -> int:
    worker = start(settings)
    if worker is None:
        return 2
    try:
        return _record(worker, jobs, target)
    finally:
        worker.close()


def _record(worker: Worker, jobs: list[dict[str, Any]], target: Path) -> int:
    from tqdm import tqdm

    from image_worker.model import ranges

    transformer = worker.model.transformer
    with ranges.watch_served(transformer) as recorder:
        for job in tqdm(jobs, desc="calibrate", unit="job", disable=None):
            reply = worker.run_blocking(job)
            if "error" in reply:
                error = reply["error"]
                sys.stderr.write(f"error: {job['id']}: {error['type']}: {error['message']}\n")
                return 1
    try:
        unread = ranges.write(target, recorder, transformer.config)
    except WorkerError as error:
        return failed(error, 1)
    except OSError as error:
        sys.stderr.write(f"error: {target} cannot be written: {error.strerror}\n")
        return 1
    layers = len(ranges.layers_of(transformer.config))
    sys.stdout.write(
        f"layers: {layers}, of which {unread} read nothing; jobs: {len(jobs)}; "
        f"forwards: {recorder.forwards}; weights: {worker.model.weights}\n{target}\n"
    )
    return 0

"""`python -m image_worker edit`: one edit on this machine, from files to a file."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_worker.errors import InvalidImage, InvalidRequest, WorkerError

if TYPE_CHECKING:
    from image_worker.settings import Settings
    from image_worker.worker import Worker

FOLDER = Path("generated-images")
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_ABOUT = (
    "Edits one to four pictures as the last argument says, and prints where the result is. "
    "Settings come from environment variables, as for the worker."
)
log = logging.getLogger(__name__)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its options."""
    command = commands.add_parser(
        "edit",
        help="edit pictures on this machine",
        description=_ABOUT,
        usage="%(prog)s [PICTURE ...] INSTRUCTION [-o FILE] [--seed N] [--steps N] [--size WxH] "
        "[--format png|jpeg|webp]",
    )
    command.add_argument(
        "given",
        nargs="+",
        metavar="PICTURE ... INSTRUCTION",
        help="files, then what to do, in quotes; models that make pictures from text take no file",
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"where the result goes; a number is added to a name that is taken (default: {FOLDER}/"
        "MODEL_SAMPLER_TIME.png)",
    )
    command.add_argument("--seed", type=int, metavar="N", help="for the same result again")
    command.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    command.add_argument("--size", type=_size, metavar="WxH", help="of the result, in pixels")
    command.add_argument("--format", choices=("png", "jpeg", "webp"), help="of the result")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """One edit. Returns the exit status: 1 if the job failed, 2 if the worker cannot start."""
    from image_worker.serve.main import set_up_logging
    from image_worker.serve.process import prepare_process
    from image_worker.settings import Settings

    prepare_process()
    try:
        try:
            settings = for_files(Settings.from_env())
            set_up_logging(settings)
        except WorkerError as error:
            return failed(error, 2)
        try:
            job = job_of(options)
            target = target_of(options)
            _check(job, settings)
        except WorkerError as error:
            return failed(error, 1)
        return _start_and_edit(settings, job, target)
    finally:
        gc.enable()


def start(settings: Settings) -> Worker | None:
    """A worker; None: it cannot start, and the standard error has why."""
    from image_worker.worker import Worker

    try:
        return Worker.from_settings(settings)
    except WorkerError as error:
        failed(error, 2)
    except Exception:  # the start's own catch-all, as in serve/main.py
        log.exception("error: the worker could not start")
    return None


def _start_and_edit(settings: Settings, job: dict[str, Any], target: Path | None) -> int:
    worker = start(settings)
    if worker is None:
        return 2
    try:
        return _edit(worker, job, target)
    finally:
        worker.close()


def _edit(worker: Worker, job: dict[str, Any], target: Path | None) -> int:
    import pybase64

    from image_worker.serve.command import answer

    reply = answer(worker, job)
    if "error" in reply:
        error = reply["error"]
        sys.stderr.write(f"error: {error['type']}: {error['message']}\n")
        return 1
    wanted = target or FOLDER / name_of(worker, reply)
    try:
        path = write(wanted, pybase64.b64decode(reply["images"][0]))
    except OSError as error:
        sys.stderr.write(f"error: the picture cannot be written to {wanted}: {error.strerror}\n")
        return 1
    for warning in reply["warnings"]:
        sys.stderr.write(f"note: {warning}\n")
    size = f"{reply['width']}x{reply['height']}"
    seconds = reply["timings"]["total"]
    steps = reply["num_inference_steps"]
    sys.stdout.write(f"{size}, {steps} steps, seed {reply['seed']}, {seconds:.2f} s\n{path}\n")
    return 0


def for_files(settings: Settings) -> Settings:
    """The settings of a job whose picture becomes a file here: no queue, no storage."""
    away = (
        "runpod_webhook_get_job",
        "bucket_endpoint_url",
        "bucket_access_key_id",
        "bucket_secret_access_key",
        "bucket_name",
    )
    return settings.model_copy(update=dict.fromkeys(away))


def job_of(options: argparse.Namespace) -> dict[str, Any]:
    """The job that the command line asks for. Pictures are read, and looked through.

    Raises:
        InvalidRequest: there is no instruction.
        InvalidImage: a picture cannot be read, or is none; says which.
    """
    import pybase64

    *pictures, instruction = options.given
    if _is_file(instruction):
        raise InvalidRequest(
            f"the last argument is what to do, and {instruction} is a file: put that first"
        )
    wanted: dict[str, Any] = {
        "prompt": instruction,
        "seed": options.seed,
        "num_inference_steps": options.steps,
        "output_format": _format_of(options),
    }
    if options.size is not None:
        wanted["width"], wanted["height"] = options.size
    read = [pybase64.b64encode_as_string(read_picture(Path(name))) for name in pictures]
    if read:
        wanted["images"] = read
    return {
        "id": "edit",
        "input": {name: value for name, value in wanted.items() if value is not None},
    }


def read_picture(path: Path) -> bytes:
    """A picture's file, once it is known to be one that the worker takes.

    Raises:
        InvalidImage: it is not there, or not a picture; says why.
    """
    from image_worker.job.images import MAX_BYTES, decode

    try:
        if path.is_dir():
            raise InvalidImage(f"{path} is a folder, not a picture")
        if not path.is_file():
            there = "is no file" if path.exists() else "is not there"
            raise InvalidImage(f"{path} {there}")
        if path.stat().st_size > MAX_BYTES:
            raise InvalidImage(f"{path} is over {MAX_BYTES // 2**20} MiB")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: of a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise InvalidImage(f"{path} cannot be read: {reason}") from None
    try:
        decode(data)  # all of it: a start takes longer, and would be for nothing
    except InvalidImage as error:
        raise InvalidImage(f"{path}: {error}") from None
    return data


def target_of(options: argparse.Namespace) -> Path | None:
    """The file that was asked for; None: a name is to be made up.

    Raises:
        InvalidRequest: its name is not of the format.
    """
    if options.output is None:
        return None
    path, wanted = Path(options.output), _format_of(options)
    if path.is_dir() or options.output.endswith("/"):
        raise InvalidRequest(f"--output {options.output} is a folder; name a file in it")
    if not path.suffix:
        return path.with_name(f"{path.name}.{wanted}")
    if FORMATS.get(path.suffix.lower()) != wanted:
        raise InvalidRequest(f"--output {path.name} is no name for {wanted}")
    return path


def name_of(worker: Worker, reply: dict[str, Any]) -> str:
    """A name that tells how and when a picture was made."""
    steps, trained = reply["num_inference_steps"], worker.model.lightning_steps
    sampler = f"euler{steps}"
    if trained:
        sampler = f"lightning{trained}" + (f"-in-{steps}" if steps != trained else "")
    moment = time.strftime("%Y%m%d-%H%M%S")
    return f"{reply['model']}_{sampler}_{moment}.{reply['output_format']}"


def write(path: Path, data: bytes) -> Path:
    """Writes a new file, and says under which name: a number is added to one that is taken.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number, free = 1, path
    while True:
        try:
            with free.open("xb") as stream:
                stream.write(data)
            return free
        except FileExistsError:
            number += 1
            free = path.with_name(f"{path.stem}-{number}{path.suffix}")


def _check(job: dict[str, Any], settings: Settings) -> None:
    """What the worker would refuse after its start, which takes long."""
    import torch

    from image_worker.catalog import choose
    from image_worker.checkpoints import model_of
    from image_worker.job.request import EditRequest

    entry = choose(model_of(settings), has_card=torch.cuda.is_available())
    if entry.max_images and "images" not in job["input"]:
        raise InvalidRequest(f"{entry.name} edits pictures: name one before the instruction")
    EditRequest.parse(job["input"], entry)


def _format_of(options: argparse.Namespace) -> str:
    suffix = Path(options.output or "").suffix.lower()
    wanted: str = options.format or FORMATS.get(suffix, "png")
    return wanted


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a long instruction is no name of a file
        return False


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (
        cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 1024x768")
    return int(width), int(height)


def failed(error: WorkerError, status: int) -> int:
    """Says what is wrong. Returns the exit status."""
    sys.stderr.write(f"error: {error.type}: {error}\n")
    return status

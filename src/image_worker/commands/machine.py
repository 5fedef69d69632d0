"""Looks at the card, by the driver's own tool and by torch. What is missing is said, not fatal."""

from __future__ import annotations

import ctypes
import subprocess
import warnings

from image_worker.commands.facts import Card, Driver, Process, Torch

MIB = 2**20
_TOOL = "nvidia-smi"
_SECONDS = 30.0  # a driver that starts up takes several
_OF_CARDS = "name,compute_cap,driver_version,memory.total,memory.free"
_OF_PROCESSES = "pid,process_name,used_memory"


def look_at_driver() -> Driver:
    """Cards, and the processes on them, as the driver's tool lists them."""
    try:
        cards = [card(line) for line in _ask(f"--query-gpu={_OF_CARDS}")]
        processes = [process(line) for line in _ask(f"--query-compute-apps={_OF_PROCESSES}")]
    except FileNotFoundError:
        return Driver(problem=f"there is no {_TOOL}", cuda=_cuda_of_driver())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Driver(problem=f"{_TOOL} does not answer: {_reason(error)}", cuda=_cuda_of_driver())
    return Driver(tuple(cards), tuple(processes), cuda=_cuda_of_driver())


def card(line: str) -> Card:
    """From the tool's line. Memory that a card shares with the host is not told there.

    Raises:
        ValueError: there are other fields.
    """
    # A name may have commas in it.
    name, capability, driver, total, free = (part.strip() for part in line.rsplit(",", 4))
    major, _, minor = capability.partition(".")
    known = major.isdigit() and minor.isdigit()
    return Card(
        name=name,
        capability=(int(major), int(minor)) if known else None,
        total=_bytes(total),
        free=_bytes(free),
        driver=driver,
    )


def process(line: str) -> Process:
    """From the tool's line.

    Raises:
        ValueError: there are other fields.
    """
    pid, _, rest = line.partition(",")
    name, used = rest.rsplit(",", 1)
    return Process(int(pid), name.strip(), _bytes(used.strip()))


def look_at_torch() -> Torch:
    """Imports it, which takes seconds, and makes its context on the card."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            import torch
        except (ImportError, OSError) as error:  # a library of its own may be missing, too
            return Torch(None, problem=_reason(error))
        found = Torch(torch.__version__, torch.version.cuda)
        try:
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                capability = torch.cuda.get_device_capability()
                card = Card(torch.cuda.get_device_name(), capability, total, free)
                return Torch(found.version, found.cuda, card)
        except RuntimeError as error:
            return Torch(found.version, found.cuda, problem=_reason(error))
    about_cuda = [str(one.message) for one in said if "CUDA" in str(one.message)]
    return Torch(found.version, found.cuda, problem=about_cuda[0] if about_cuda else None)


def _ask(query: str) -> list[str]:
    command = [_TOOL, query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise OSError((done.stdout + done.stderr).strip() or f"exit status {done.returncode}")
    return [line for line in done.stdout.splitlines() if line.strip()]


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) * MIB if mebibytes.isdigit() else None


def _cuda_of_driver() -> tuple[int, int] | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _reason(error: BaseException) -> str:
    """The first line of what it says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

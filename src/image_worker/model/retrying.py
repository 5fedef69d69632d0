"""Requests to the hub, tried again while that may help, and what is said when it does not.

huggingface_hub tries again by count, and for as long as the hub asks it to wait. Here the limit is
a time, and it is one without progress: a slow download is none that has failed.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx2
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from image_worker.errors import ModelUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds


class Stopped(Exception):
    """Given up, because something else failed for good."""


def keep_trying(
    name: str,
    attempt: Callable[[], T],
    timeout: float,
    stop: threading.Event,
    reached: Callable[[], int] = lambda: 0,
) -> T:
    """What `attempt` returns, once it does.

    timeout: seconds without progress; `reached` says how many bytes there are so far.

    Raises:
        ModelUnavailable: `name` cannot be had: what waiting does not mend, or for `timeout`.
        Stopped: `stop` was set.
    """
    position, since, failures = reached(), time.monotonic(), 0
    while not stop.is_set():
        try:
            return attempt()
        except (httpx2.HTTPError, OSError) as error:
            cause = error  # Python forgets `error` at the end of this block
        reason, passes = _diagnose(cause)
        if not passes:
            raise ModelUnavailable(f"{name} could not be downloaded: {reason}") from cause
        now = time.monotonic()
        if (size := reached()) != position:
            position, since, failures = size, now, 0
        left = since + timeout - now
        if left <= 0:
            raise ModelUnavailable(
                f"{name} could not be downloaded: {reason}; nothing arrived for {timeout:g} s "
                "(DOWNLOAD_TIMEOUT). What did arrive is kept for the next start"
            ) from cause
        wait = min(max(_asked_wait(cause), _backoff(failures)), left)
        failures += 1
        log.warning("%s: %s (%s); trying again in %.1f s", name, reason, cause, wait)
        stop.wait(wait)
    raise Stopped(name)


def is_refusal(error: BaseException | None) -> bool:
    """Whether the hub has not what it was asked for, or not for this worker."""
    return isinstance(error, HfHubHTTPError) and not _diagnose(error)[1]


def _backoff(failures: int) -> float:
    """Seconds; random, so that workers that failed together do not return together."""
    longest = min(FIRST_WAIT * 2 ** min(failures, 16), LONGEST_WAIT)
    return random.uniform(longest / 2, longest)


def _asked_wait(error: Exception) -> float:
    """The seconds that the hub asks to wait, or 0."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if error.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = headers.get("Retry-After", "")
    return float(after) if after.isdecimal() else 0.0


def _diagnose(error: Exception) -> tuple[str, bool]:
    """What is wrong and what helps, in plain words; and whether it may pass by itself."""
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, error.response.status_code)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it; unset it", False
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return "the hub cannot be reached; check the network", True
    if isinstance(error, httpx2.TimeoutException):
        return "the hub sends nothing", True
    if isinstance(error, httpx2.HTTPError):
        return "the connection was cut", True
    if isinstance(error, TimeoutError):
        return "another worker that shares MODEL_DIR is fetching it", True
    if isinstance(error, FileNotFoundError):
        return "another worker that shares MODEL_DIR has moved it", True
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "MODEL_DIR has no room left; give it more, or set MODEL_DIR elsewhere", False
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "MODEL_DIR cannot be written; mount it for writing, or set it elsewhere", False
    return f"{getattr(error, 'strerror', None) or type(error).__name__}; check MODEL_DIR", False


def _refusal(error: Any, status: int) -> tuple[str, bool]:
    if isinstance(error, GatedRepoError):
        words = (
            "the repo is gated: accept its terms on the hub, and set HF_TOKEN to a token of yours"
        )
        return words, False
    if isinstance(error, RevisionNotFoundError):
        return "the repo has no such revision; check MODEL_REVISION", False
    if isinstance(error, EntryNotFoundError):
        return "the repo has no such file at this revision", False
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        words = "it does not exist on the hub, or needs a token (HF_TOKEN) that may read it"
        return f"{words} (HTTP {status})", False
    if status == 429:
        words = "the hub takes no more requests for now (HTTP 429); with HF_TOKEN it takes more"
        return words, True
    passes = status == 408 or status >= 500
    return f"the hub {'is in trouble' if passes else 'refuses'} (HTTP {status})", passes

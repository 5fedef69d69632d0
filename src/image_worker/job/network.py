"""HTTP to addresses that callers name: public ones only, and never for longer than allowed."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from image_worker.errors import WorkerError

_PORTS = {"http": 80, "https": 443}
_NO_RETRIES = Retry(0, read=False)
_IDLE_SECONDS = 10  # longest silence of a server
_MAX_REDIRECTS = 5

# On top of what the SDK refuses: networks that lead on to an IPv4 address in the packet's own
# address, and reserved ones that the ipaddress module of earlier Pythons takes for public.
_REFUSED = tuple(
    map(
        ipaddress.ip_network,
        (
            "64:ff9b::/96",  # NAT64
            "64:ff9b:1::/48",
            "2001::/32",  # Teredo
            "2002::/16",  # 6to4, and its relays
            "192.88.99.0/24",
            "::/96",  # IPv4-compatible
            "::ffff:0:0:0/96",  # IPv4-translated
            "fec0::/10",
            "3fff::/20",
            "192.0.0.0/24",
        ),
    )
)

# Work whose end is no longer waited for still holds a thread: this bounds how many there can be.
_SLOTS = threading.BoundedSemaphore(64)

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T], late: WorkerError) -> T:
    """The result of `work`, or `late` raised after `seconds`, even amid a read that goes on.

    `work` then ends when its server does, and must have bounds of its own for what it may hold.
    """
    result: list[T] = []
    problem: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 (raised again below, by the waiting thread)
            problem.append(error)
        finally:
            _SLOTS.release()

    deadline = time.monotonic() + seconds
    if not _SLOTS.acquire(timeout=max(0.0, seconds)):
        raise late
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if problem:
        raise problem[0]
    if not result:
        raise late
    return result[0]


def public_addresses(url: str) -> list[str]:
    """The addresses of a URL's host, all of them public.

    Raises:
        SSRFError: another scheme than http(s), or an address that is not public; caused by an
            OSError where the name could not be resolved.
        ValueError: not a URL.
    """
    # Late, like all of the SDK: importing it takes a second and configures logging.
    from runpod.serverless.utils.rp_ssrf import SSRFError, resolve_and_validate

    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise SSRFError("not an http(s) URL with a host")
    port = _PORTS[parts.scheme] if parts.port is None else parts.port
    addresses: list[str] = resolve_and_validate(parts.hostname, port)
    for address in map(ipaddress.ip_address, addresses):
        plain = getattr(address, "ipv4_mapped", None) or address
        if any(plain in network for network in _REFUSED):
            raise SSRFError("the host's address is not public")
    return addresses


@contextmanager
def request(
    method: str, url: str, *, public: bool = True, retries: Retry = _NO_RETRIES, **options: Any
) -> Iterator[requests.Response]:
    """One exchange, its body still unread. Redirects are answers like any other.

    With `public`, the connection goes to the very address that was checked, whatever the host's
    name leads to a moment later. `options` are those of `requests`.

    Raises:
        SSRFError, ValueError: as `public_addresses`.
        requests.RequestException: no answer.
    """
    from runpod.serverless.utils.rp_ssrf import PinnedIPAdapter

    adapters: list[HTTPAdapter] = (
        [PinnedIPAdapter(address, max_retries=retries) for address in public_addresses(url)]
        if public
        else [HTTPAdapter(max_retries=retries)]
    )
    for adapter in adapters:
        with requests.Session() as session:
            # A proxy would resolve the name again; and the worker's .netrc is no caller's.
            session.trust_env = not public
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            try:
                response = session.request(
                    method, url, allow_redirects=False, stream=True, **options
                )
            except requests.ConnectionError:
                if adapter is adapters[-1]:
                    raise
                continue  # IPv6 without a route, often: the next address may have one
            with response:
                yield response
                return


@dataclass(frozen=True)
class Wanted:
    """What a caller's URL is to lead to, as messages call it, and the errors where it does not.

    refused: the caller's fault; unavailable: it may pass; schemes: what all of its URLs begin with.
    """

    name: str
    refused: type[WorkerError]
    unavailable: type[WorkerError]
    schemes: tuple[str, ...] = ("http://", "https://")

    def fetch(self, url: str, receive: Callable[[requests.Response], T]) -> T:
        """What `receive` makes of the answer, whose body is still unread. Redirects are followed.

        Raises:
            WorkerError: of the two kinds; `receive`'s own ones pass.
        """
        from runpod.serverless.utils.rp_ssrf import SSRFError

        try:
            for _ in range(_MAX_REDIRECTS + 1):
                if not url.lower().startswith(self.schemes):
                    allowed = " or ".join(self.schemes)
                    raise self.refused(f"the URL is not allowed: it must begin with {allowed}")
                with request("GET", url, timeout=_IDLE_SECONDS) as response:
                    if not response.is_redirect:
                        return receive(response)
                    url = urljoin(url, response.headers["Location"])
            raise self.refused("the URL leads to too many others")
        except WorkerError:
            raise
        except SSRFError as error:
            if isinstance(error.__cause__, OSError):
                raise self.unavailable("the host name of the URL could not be resolved") from error
            raise self.refused(
                "the URL is not allowed: it must lead to a public address"
            ) from error
        except ValueError as error:  # requests' and urllib's errors about the URL itself
            raise self.refused("the URL is not valid") from error
        except Exception as error:
            raise self.unavailable(f"{self.name} could not be fetched from its URL") from error

    def check(self, response: requests.Response, max_bytes: int, too_large: str) -> None:
        """Whether the answer has it, and within so many bytes, as far as it says.

        Raises:
            WorkerError: of the two kinds.
        """
        status, length = response.status_code, response.headers.get("Content-Length", "")
        if status in (408, 425, 429) or status >= 500:
            raise self.unavailable(f"{self.name}'s server answered {status}")
        if status != 200:
            raise self.refused(f"{self.name}'s server answered {status}")
        if length.isdigit() and int(length[:20]) > max_bytes:
            raise self.refused(too_large)

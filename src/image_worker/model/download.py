"""Fetches files of one revision of a repo into a Hugging Face cache, so that nothing is done twice.

The list, the addresses, the connections, the locks and the cache's links are huggingface_hub's. The
bytes are written here, because its own downloads throw away a file that was cut off, and compare
nothing but sizes. Here a partial file stays where the next attempt, or the next process, finds it,
and a file is in the cache once its checksum is right. Bytes are written at their own positions, so
even two workers whose file system ignores locks do no harm to each other.

Plain HTTP, also for what the hub keeps in Xet: Xet's downloads cannot continue after a kill.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import constants, hf_hub_url

# Private, but the public way asks the hub about each file again, with retries of its own.
from huggingface_hub.file_download import _create_symlink
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status

from image_worker.errors import ModelUnavailable
from image_worker.model.listing import ListedFile, list_files
from image_worker.model.progress import Progress
from image_worker.model.retrying import Stopped, keep_trying
from image_worker.model.selection import WEIGHTS

T = TypeVar("T")
Reached = Callable[[], int]

log = logging.getLogger(__name__)

PARALLEL = 8  # files
LOG_EVERY = 10.0  # seconds
WRITE = 2**20  # bytes; also the most that a killed process loses of a file


class Snapshot:
    """One revision of a repo on the hub, and the folder of `cache` that holds it."""

    def __init__(
        self, repo: str, revision: str, cache: Path, timeout: float, token: bool = True
    ) -> None:
        """Asks the hub which files there are.

        timeout: seconds without progress, here and later; token: asks with the operator's, if there
        is one. Without, only what is public is had.

        Raises:
            ModelUnavailable: the hub does not say.
        """
        self._repo, self._revision, self._cache, self._timeout = repo, revision, cache, timeout
        self._token = None if token else False  # None: as the environment has it
        self._name = f"{repo}@{revision}"
        self._storage = cache / f"models--{repo.replace('/', '--')}"
        self._locks = cache / ".locks" / self._storage.name
        self._stop = threading.Event()
        self._commit, self._files = self._try(
            f"the list of files of {self._name}",
            partial(list_files, repo, revision, token=self._token),
        )
        self._folder = self._storage / "snapshots" / self._commit

    @property
    def paths(self) -> list[str]:
        """The repo's files at this revision."""
        return sorted(self._files)

    def size(self, path: str) -> int:
        """Bytes of one of them; 0 if it is none."""
        return self._files[path].size if path in self._files else 0

    def fetch(self, paths: Iterable[str]) -> Path:
        """The snapshot's folder, with these files in it. What is there already is not read again.

        Raises:
            ModelUnavailable: names the file that cannot be had, and says why, and what helps.
        """
        wanted = list(paths)
        if unknown := sorted(set(wanted) - self._files.keys()):
            raise ModelUnavailable(f"{self._name} has no {unknown[0]} on the hub")
        missing = self._try(self._name, partial(self._missing, wanted))
        if missing:
            by_content = {file.checksum: file for file in missing}  # equal files are one blob
            largest_first = sorted(by_content.values(), key=lambda file: -file.size)
            self._try(self._name, partial(self._make_room, largest_first))
            self._get_all(largest_first)
            # Weights last: a killed process leaves no folder that looks complete.
            for file in sorted(missing, key=lambda file: file.path.endswith(WEIGHTS)):
                self._try(f"{file.path} of {self._name}", partial(self._link, file))
        self._try(self._name, self._note_revision)
        return self._folder

    def _try(self, name: str, attempt: Callable[[], T], reached: Reached = lambda: 0) -> T:
        return keep_trying(name, attempt, self._timeout, self._stop, reached)

    def _at(self, file: ListedFile, suffix: str = "") -> Path:
        return self._storage / "blobs" / f"{file.checksum}{suffix}"

    def _is_linked(self, file: ListedFile) -> bool:
        return _size(self._folder / file.path) == file.size

    def _missing(self, paths: list[str]) -> list[ListedFile]:
        return [self._files[path] for path in paths if not self._is_linked(self._files[path])]

    def _make_room(self, files: list[ListedFile]) -> None:
        for folder in (self._storage / "blobs", self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        needed = 0
        for file in files:
            if (size := _size(self._at(file))) == file.size:
                continue
            if size is not None:
                log.warning("%s has %d bytes instead of %d: damaged", file.path, size, file.size)
                self._at(file).unlink()
            needed += file.size - min(self._part_size(file), file.size)
        try:
            free = shutil.disk_usage(self._storage).free
        except OSError as error:
            log.warning("whether %s has room cannot be known: %s", self._cache, error)
            return
        if needed > free:
            raise ModelUnavailable(
                f"{self._name} needs {needed / 1e9:.2f} GB more, and MODEL_DIR ({self._cache}) has "
                f"{free / 1e9:.2f} GB free; give it more room, or set MODEL_DIR elsewhere"
            )

    def _get_all(self, files: list[ListedFile]) -> None:
        sizes = {file.checksum: file.size for file in files}
        there = {file.checksum: self._part_size(file) for file in files}
        with Progress(self._name, sizes, there) as progress, ThreadPoolExecutor(PARALLEL) as pool:
            pending = {pool.submit(self._get, progress, file) for file in files}
            try:
                while pending:
                    done, pending = wait(pending, LOG_EVERY, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    progress.tell()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _get(self, progress: Progress, file: ListedFile) -> None:
        name = f"{file.path} of {self._name}"
        reached = partial(self._reached, progress, file)
        for _ in range(2):
            if self._try(name, partial(self._attempt, progress, file), reached):
                return
            log.warning("%s arrived with other bytes than the hub says", name)
        raise ModelUnavailable(
            f"{name} arrived twice with other bytes than the hub says (its checksum differs); "
            "check what is between this machine and the hub, and MODEL_DIR's disk"
        )

    def _part_size(self, file: ListedFile) -> int:
        try:
            return _size(self._at(file, ".incomplete")) or 0
        except OSError:  # what is wrong shows when it is written
            return 0

    def _reached(self, progress: Progress, file: ListedFile) -> int:
        size = self._part_size(file)
        progress.at(file.checksum, size)
        return size

    def _attempt(self, progress: Progress, file: ListedFile) -> bool:
        """Whether the file is in place; if not, the bytes were wrong, and are gone."""
        place, part = self._at(file), self._at(file, ".incomplete")
        lock = self._locks / f"{file.checksum}.lock"
        with WeakFileLock(lock, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT):
            if not place.is_file():
                self._receive(progress, file, part)
                if not file.matches(part):
                    part.unlink(missing_ok=True)
                    return False
                part.replace(place)
        progress.at(file.checksum, file.size)
        return True

    def _receive(self, progress: Progress, file: ListedFile, part: Path) -> None:
        part.touch()
        with part.open("r+b", buffering=WRITE) as stream:
            position = stream.seek(0, os.SEEK_END)
            if position > file.size:
                position = stream.truncate(0)
            if position == file.size:
                return
            url = hf_hub_url(self._repo, file.path, revision=self._commit)
            headers = build_hf_headers(token=self._token)
            headers |= {"Accept-Encoding": "identity", "Range": f"bytes={position}-"}
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:  # all of it, from the start
                    position = 0
                stream.seek(position)
                for chunk in response.iter_bytes():
                    if self._stop.is_set():
                        raise Stopped(file.path)
                    position += stream.write(chunk)
                    progress.at(file.checksum, position)
                    if position > file.size:
                        break
            stream.flush()
            os.fsync(stream.fileno())  # later starts trust its size alone
        if position < file.size:
            raise httpx2.ReadError(f"{file.size - position} bytes did not come")

    def _link(self, file: ListedFile) -> None:
        if not self._is_linked(file):
            place, link = self._at(file), self._folder / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            # Where there are no symbolic links, weights move; what may be there twice does not.
            _create_symlink(str(place), str(link), new_blob=file.path.endswith(WEIGHTS))

    def _note_revision(self) -> None:
        """What a branch or tag stood for, so that the cache is found without the hub."""
        if self._revision == self._commit:
            return
        ref = self._storage / "refs" / self._revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        new.write_text(self._commit)
        new.replace(ref)


def _size(path: Path) -> int | None:
    """Bytes; None without a file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None

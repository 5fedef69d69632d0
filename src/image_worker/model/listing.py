"""What the hub says of a repo: its files at a revision, their sizes and checksums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from image_worker.errors import ModelUnavailable

_READ = 2**24  # bytes


@dataclass(frozen=True)
class ListedFile:
    """A file as the hub describes it: its size in bytes, and the checksum that names its blob."""

    path: str
    size: int
    checksum: str
    is_lfs: bool  # sha256 of the bytes; of other files, git's sha1

    @classmethod
    def of(cls, file: Any) -> ListedFile:
        """From a `RepoSibling` with metadata."""
        size, checksum = (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size, file.blob_id)
        return cls(file.rfilename, int(size), bytes.fromhex(checksum).hex(), bool(file.lfs))

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has these bytes; reads all of it."""
        with path.open("rb") as stream:
            if self.is_lfs:
                return bool(sha_fileobj(stream, _READ).hex() == self.checksum)
            return bool(git_hash(stream.read()) == self.checksum)


def list_files(
    repo: str, revision: str, token: bool | None = None
) -> tuple[str, dict[str, ListedFile]]:
    """The commit that `revision` stands for, and its files by their paths. Asks once.

    token: None: with the environment's, if there is one; False: without.

    Raises:
        ModelUnavailable: the answer is none of a hub.
    """
    try:
        info = HfApi().model_info(
            repo,
            revision=revision,
            files_metadata=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            token=token,
        )
        return bytes.fromhex(info.sha).hex(), {f.rfilename: ListedFile.of(f) for f in info.siblings}
    except (ValueError, LookupError, TypeError) as error:
        raise ModelUnavailable(
            f"the list of files of {repo}@{revision} is none of a hub's; check HF_ENDPOINT"
        ) from error

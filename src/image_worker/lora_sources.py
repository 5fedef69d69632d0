"""Which sources of LoRAs jobs may name, as `LORA_SOURCES` says; nothing of how these are had."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from image_worker.errors import InvalidSettings

_KINDS = {
    "folder": "files of its own folder",
    "hub": "public repos of the hub",
    "https": "https URLs of any host",
}
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/(?:\*|[A-Za-z0-9][\w.-]*)")
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z][a-z0-9-]*")
_PLAIN = re.compile(r"[\w.-]+(?::443)?")  # of a URL, what is read alike by everybody


@dataclass(frozen=True)
class LoraSources:
    """kinds: of `folder`, `hub` and `https`; repos: `owner/name` and `owner/*`; hosts: of URLs."""

    kinds: tuple[str, ...]
    repos: tuple[str, ...]
    hosts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> LoraSources:
        """
        Raises:
            InvalidSettings: a part is none of the forms that there are.
        """
        kinds, repos, hosts = [], [], []
        for part in (part.strip() for part in text.split(",")):
            if part in _KINDS:
                kinds.append(part)
            elif _REPO.fullmatch(part):
                repos.append(part)
            elif _HOST.fullmatch(part.lower()):
                hosts.append(part.lower())
            else:
                raise InvalidSettings(
                    f"LORA_SOURCES={text!r} is not valid: {part!r} is none of folder, hub, https, "
                    "owner/name, owner/*, or the name of a host; separate them by commas"
                )
        return cls(tuple(kinds), tuple(repos), tuple(hosts))

    @property
    def folder(self) -> bool:
        """Whether files of the operator's folder may be named."""
        return "folder" in self.kinds

    def names(self, repo: str) -> bool:
        """Whether a repo is on the list itself, so that it is read with the operator's token."""
        return any(fnmatchcase(repo, pattern) for pattern in self.repos)

    def has_repo(self, repo: str, revision: str | None) -> bool:
        """Whether a repo of the hub may be named, at that revision.

        Pull requests' are not their owner's: anybody can open one.
        """
        is_own = not (revision or "").lower().startswith("refs/")
        return "hub" in self.kinds or (is_own and self.names(repo))

    def has_url(self, url: str) -> bool:
        """Whether an https URL may be named."""
        if "https" in self.kinds:
            return True
        place = urlsplit(url).netloc
        return _PLAIN.fullmatch(place) is not None and place.lower().removesuffix(":443") in (
            self.hosts
        )

    def describe(self) -> str:
        """For those whose job named something else."""
        hosts = [f"https URLs of {host}" for host in self.hosts]
        chosen = ["repos that its operator chose"] if self.repos else []  # they may be private
        return ", ".join([*(_KINDS[kind] for kind in self.kinds), *chosen, *hosts])

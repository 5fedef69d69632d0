"""What the doctor knows of a machine, and what it says: values only, so that tests can make any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # pydantic may be what is missing
    from image_worker.settings import Precision, Settings


Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line. A problem is what would prevent a start, or have it serve something else."""

    status: Status
    topic: str
    text: str


@dataclass(frozen=True)
class Card:
    """total, free: bytes; None, here and below: nobody says."""

    name: str
    capability: tuple[int, int] | None
    total: int | None
    free: int | None
    driver: str | None = None


@dataclass(frozen=True)
class Process:
    """Another process that has memory of a card: used, in bytes."""

    pid: int
    name: str
    used: int | None


@dataclass(frozen=True)
class Driver:
    """What the driver's own tool says.

    cards: in its order; problem: why it says nothing; cuda: the latest CUDA that the driver runs.
    """

    cards: tuple[Card, ...] = ()
    processes: tuple[Process, ...] = ()
    problem: str | None = None
    cuda: tuple[int, int] | None = None


@dataclass(frozen=True)
class Torch:
    """What torch says. cuda: that it is built with; card: the first that it sees, which serves.

    problem: why it cannot be imported, or sees no card.
    """

    version: str | None
    cuda: str | None = None
    card: Card | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Package:
    """A requirement of this project: what it asks for, such as "==2.13.0", and what is there."""

    name: str
    wanted: str
    found: str | None
    fits: bool


@dataclass(frozen=True)
class PreparedFolder:
    """Prepared weights. model, precision: by their manifest; size: bytes."""

    name: str
    model: str
    precision: str
    size: int


@dataclass(frozen=True)
class CheckpointFile:
    """The file that CHECKPOINT or TEXT_ENCODER_CHECKPOINT names.

    size: bytes, None where it is not on this machine; label: its format, None if nobody looked;
    known_for: the catalogue's model, None for files that are not listed; lightning: steps of the
    LoRA that is merged in it, 0 for none, as far as settings, metadata or the catalogue say;
    problem: why a start would end.
    """

    name: str
    size: int | None = None
    label: str | None = None
    known_for: str | None = None
    lightning: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Downloads:
    """Files of a kind that were fetched: for jobs (`loras`), or for CHECKPOINT and
    TEXT_ENCODER_CHECKPOINT (`checkpoints`).
    """

    kind: Literal["loras", "checkpoints"]
    count: int
    size: int


@dataclass(frozen=True)
class Places:
    """Where weights are and may be.

    model_dir: its path; free: bytes of its disk; has_model, has_adapter: whether all files of them
    are on this machine; partial: bytes of the model that are; problem: why it cannot be looked for;
    volume: a network volume is mounted; in_volume: MODEL_DIR is there; downloads: what was
    fetched beside models.
    """

    model_dir: str
    free: int | None
    writable: bool = True
    has_model: bool = False
    has_adapter: bool = False
    partial: int = 0
    problem: str | None = None
    prepared: tuple[PreparedFolder, ...] = ()
    volume: bool = False
    in_volume: bool = False
    downloads: tuple[Downloads, ...] = ()


@dataclass(frozen=True)
class Facts:
    """All of it. host: bytes of the host's memory that can still be had."""

    settings: Settings | None
    settings_problem: str | None
    driver: Driver
    torch: Torch
    places: Places | None
    host: int | None
    packages: tuple[Package, ...] = ()
    packages_problem: str | None = None
    strangers: Mapping[str, str] = field(default_factory=dict)
    has_token: bool = False
    checkpoint: CheckpointFile | None = None
    text_encoder: CheckpointFile | None = None

    @property
    def card(self) -> Card | None:
        """The one that would serve, if torch could use it."""
        return self.torch.card or next(iter(self.driver.cards), None)


@dataclass(frozen=True)
class Row:
    """One precision on this card.

    places: "all stay", "blocks pass", "blocks pass, from disk" or "no"; peak: forecast bytes;
    products: what it multiplies in; speed: as far as it was measured; why: the plan in words, or
    why there is none.
    """

    precision: Precision
    places: str
    peak: int | None
    products: str
    speed: str
    why: str


@dataclass(frozen=True)
class Forecast:
    """What a start would do. chosen: with these settings; None: it would end, and `problem` is why.

    of: the model of the table; from_disk: weights would be read at every pass; checkpoint, adapter,
    prepared: bytes on the disk, the latter by precision; host: bytes of the host's memory that
    weights would take; label, text_label: the formats of the transformer and of the text encoder,
    if files decide them, and not precisions.
    """

    of: str
    rows: tuple[Row, ...]
    chosen: Row | None
    problem: str | None
    from_disk: bool
    host: int
    checkpoint: int
    adapter: int
    prepared: Mapping[str, int]
    label: str | None = None
    text_label: str | None = None

    @property
    def own(self) -> str:
        """What precisions say nothing of, in words; empty: there is no such thing."""
        labels = {"transformer": self.label, "text encoder": self.text_label}
        return " and ".join(f"{name} in {label}" for name, label in labels.items() if label)

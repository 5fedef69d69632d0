"""Pictures for `compare`'s page: small, in the page itself, and how they differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from image_worker.commands.compare.likeness import pixels_of

AMPLIFIED = 8  # how many times a difference is drawn
_SIDE = 320  # pixels: the longer side of a picture in the page
_SEEDS = 3  # so many of them are shown
_QUALITY = 85


def samples(results: Mapping[str, Any], out: Path) -> str:
    """The first seeds' pictures of all ways, side by side, each above where it differs."""
    shown = list(dict.fromkeys(results["seeds"]))[:_SEEDS]
    parts = []
    for seed in shown:
        figures = "".join(_of_seed(results, out, seed))
        if figures:
            parts.append(f'<h3>Seed {seed}</h3><div class="pictures">{figures}</div>')
    return "".join(parts)


def given(job: Mapping[str, Any]) -> str:
    """The pictures that the job has, as far as they are in it."""
    texts = [job.get(name) for name in ("image", "image_base64")] + list(job.get("images") or [])
    found = []
    for text in texts:
        value = text.get("base64") if isinstance(text, dict) else text
        if isinstance(value, str) and "://" not in value[:16]:
            found.append(_of_base64(value.rpartition(",")[2]))
    figures = [
        f'<figure><img alt="picture {place} of the job" src="{source}">'
        f"<figcaption>picture {place}</figcaption></figure>"
        for place, source in enumerate(found, 1)
    ]
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _of_seed(results: Mapping[str, Any], out: Path, seed: int) -> Iterator[str]:
    files = {
        way["name"]: (way, one)
        for way in results["ways"]
        for one in way["pictures"]
        if one["seed"] == seed
    }
    for name, (way, one) in files.items():
        path = out / one["file"]
        source = _of_file(path, path.stat().st_mtime_ns)
        shown = _figure(source, f"result of {name}, seed {seed}", name)
        against = files.get(way["against"])
        if against is not None and one["ssim"] is not None:
            shown += _apart(name, way["against"], one, path, out / against[1]["file"])
        yield f"<div>{shown}</div>"


def _apart(name: str, against: str, one: Mapping[str, Any], path: Path, other: Path) -> str:
    """Where a picture differs from the one that it is compared with."""
    words = f"against {against}, {AMPLIFIED} times: "
    words += "the same" if one["same"] else f"{one['psnr']:.1f} dB"
    source = _difference(path, path.stat().st_mtime_ns, other, other.stat().st_mtime_ns)
    return _figure(source, f"where {name} differs from {against}, seed {one['seed']}", words)


def _figure(source: str, alt: str, words: str) -> str:
    return (
        f'<figure><img alt="{escape(alt)}" src="{source}">'
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )


@lru_cache(maxsize=1024)
def _of_file(path: Path, _: int) -> str:
    return _source(Image.fromarray(pixels_of(path)))


@lru_cache(maxsize=1024)
def _difference(one: Path, _: int, other: Path, __: int) -> str:
    """Absolute differences of each channel, so many times, and white at most."""
    apart = np.abs(pixels_of(one).astype(int) - pixels_of(other).astype(int))
    return _source(Image.fromarray(np.minimum(AMPLIFIED * apart, 255).astype(np.uint8)))


def _of_base64(text: str) -> str:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return _source(image.convert("RGB"))


def _source(image: Image.Image) -> str:
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

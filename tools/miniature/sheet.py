"""Pictures side by side, with their instructions, as one image file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from tools.miniature.render import to_image
from tools.miniature.scenes import SIDE


def save_sheet(rows: Sequence[Sequence[tuple[str, Sequence[Tensor]]]], path: Path) -> None:
    """Rows of cells, each a title and up to four pictures (3, SIDE, SIDE)."""
    cell = 4 * (SIDE + 2) + 10
    height = SIDE + 18
    sheet = Image.new("RGB", (cell * max(map(len, rows)), height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (title, pictures) in enumerate(row):
            draw.text((x * cell, y * height + 1), title, fill="black")
            for number, picture in enumerate(pictures):
                place = (x * cell + number * (SIDE + 2), y * height + 15)
                sheet.paste(to_image(picture), place)
    sheet.save(path)

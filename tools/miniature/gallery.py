"""The README's pictures and test_input.json: `python -m tools.miniature.gallery`.

The pictures are what the worker answers to the jobs written below them, with its defaults.
"""

from __future__ import annotations

import base64
import io
import json
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from image_worker.settings import Settings
from image_worker.worker import Worker
from tools.miniature.render import draw, pack, to_image
from tools.miniature.scenes import SIDE, Ground, Scene, Speck, Thing, colour, mix

ROOT = Path(__file__).parents[2]
SEED = 7
_SKY = mix(colour("blue"), (1, 1, 1), 0.75)
SCENE = Scene(
    Ground("flat", _SKY, _SKY),
    (
        Thing("red", "circle", 30, 34, 14),
        Thing("yellow", "star", 98, 28, 15),
        Thing("green", "square", 66, 70, 13, fill="striped"),
        Thing("purple", "heart", 30, 100, 14, fill="shaded"),
        Thing("orange", "ring", 100, 98, 13),
    ),
    (
        Speck(62, 22, 6, 0.4, (0.35, 0.35, 0.35)),
        Speck(112, 64, 4, 1.2, (0.85, 0.85, 0.85)),
        Speck(66, 112, 7, 2.4, (0.5, 0.5, 0.5)),
    ),
)
_DUSK = mix(colour("purple"), (1, 1, 1), 0.6)
SECOND = Scene(Ground("flat", _DUSK, _DUSK), (Thing("cyan", "diamond", 64, 64, 15),))
EDITS = (
    "make the red circle blue",
    "remove the green square",
    "turn the purple heart into a triangle",
    "swap the colours of the red circle and the yellow star",
    "move the orange ring to the right",
    "outline the yellow star in black",
    "make the background a gradient from pink to white",
    "put the shape of picture 2 into the bottom of picture 1",
)
_COLUMNS = 3
_GAP, _TITLE = 10, 34


def main() -> None:
    """Edits the scene, and writes both files."""
    first, second = (to_image(draw(torch.from_numpy(pack([s])))[0]) for s in (SCENE, SECOND))
    job = {"input": {"prompt": EDITS[0], "image_base64": _encoded(first), "seed": SEED}}
    (ROOT / "test_input.json").write_text(json.dumps(job, indent=2) + "\n")
    worker = Worker.from_settings(Settings.from_env({"MODEL": "mini"}))
    cells = [("picture 1", first)]
    for prompt in EDITS:
        images = [first, second] if "picture 2" in prompt else [first]
        given = {"prompt": prompt, "images": [_encoded(image) for image in images], "seed": SEED}
        reply = worker.run_blocking({"id": prompt, "input": given})
        cells.append((prompt, Image.open(io.BytesIO(base64.b64decode(reply["images"][0])))))
    path = ROOT / "docs" / "edits.png"
    path.parent.mkdir(exist_ok=True)
    _sheet(cells, second).save(path, optimize=True)
    print(path)


def _encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _sheet(cells: list[tuple[str, Image.Image]], second: Image.Image) -> Image.Image:
    """Titled pictures at twice their size; the second picture is inset into its edit."""
    side = 2 * SIDE
    rows = -(-len(cells) // _COLUMNS)
    sheet = Image.new(
        "RGB", (_COLUMNS * (side + _GAP) + _GAP, rows * (side + _TITLE + _GAP) + _GAP), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (title, picture) in enumerate(cells):
        x = _GAP + number % _COLUMNS * (side + _GAP)
        y = _GAP + number // _COLUMNS * (side + _TITLE + _GAP)
        pen.multiline_text((x, y), textwrap.fill(title, 38), fill="black", font=font, spacing=1)
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y + _TITLE))
        if "picture 2" in title:
            inset = second.resize((side // 3, side // 3), Image.Resampling.LANCZOS)
            sheet.paste(inset, (x + side - side // 3, y + _TITLE + side - side // 3))
    return sheet


if __name__ == "__main__":
    main()

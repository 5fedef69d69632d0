"""Pictures as files, and compared."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A picture's file, as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def psnr(found: Image.Image, expected: Image.Image) -> float:
    """Of two 8-bit pictures, in dB; capped at 100, for equal ones."""
    difference = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
    error = (difference**2).mean()
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))

"""Pictures as the text encoder reads them: resized to whole tokens, normalised, cut into patches.

It computes what transformers' `Qwen2VLImageProcessorPil` does, to the bit, on the CPU.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from image_worker.model.text_config import Patching
from image_worker.model.vision_tower import Grid


def cut(image: Image.Image, patching: Patching) -> tuple[Tensor, Grid]:
    """An RGB picture's patches, (patches, values) float32, and how many there are each way.

    The patches of a token follow each other, and so do the tokens of a row. A patch's values are
    (channels, frames, rows, columns), all frames the same.
    """
    patch, merge = patching.patch, patching.merge
    width, height = fitted(image.width, image.height, patching)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = height // patch, width // patch
    parts = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    parts = parts.transpose(0, 3, 1, 4, 6, 2, 5)
    found = np.empty((*parts.shape[:5], patching.frames, patch, patch), np.float32)
    for channel, table in enumerate(_normalised(patching)):
        found[:, :, :, :, channel] = table[parts[:, :, :, :, channel]][:, :, :, :, None]
    return torch.from_numpy(found.reshape(rows * columns, -1)), (rows, columns)


def _normalised(patching: Patching) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """What each of a channel's values becomes, (3, 256).

    Scaled in float64 and rounded, then normalised in float32, as upstream rounds.
    """
    scaled = (np.arange(256) * patching.scale).astype(np.float32)
    mean, deviation = (np.array(x, np.float32) for x in (patching.mean, patching.deviation))
    return (scaled - mean[:, None]) / deviation[:, None]


def fitted(width: int, height: int, patching: Patching) -> tuple[int, int]:
    """(width, height) that the text encoder sees of a picture of this size, in pixels.

    Whole tokens, as many pixels as are allowed, the shape nearly kept. As upstream's `smart_resize`
    rounds: to the nearest, down where that is too large, up where it is too small.
    """
    token = patching.patch * patching.merge
    found = (round(width / token) * token, round(height / token) * token)
    if math.prod(found) > patching.most:
        scale = math.sqrt(width * height / patching.most)
        return (
            max(token, math.floor(width / scale / token) * token),
            max(token, math.floor(height / scale / token) * token),
        )
    if math.prod(found) < patching.least:
        scale = math.sqrt(patching.least / (width * height))
        return (
            math.ceil(width * scale / token) * token,
            math.ceil(height * scale / token) * token,
        )
    return found

"""Fused operations of the transformer's forward: Triton kernels, and what they compute in torch.

`reference` defines each operation and runs anywhere; `fused` has the same functions for a card.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def operations(device: torch.device) -> Any:
    """The module whose operations run on this device: Triton's need compute capability 8.0."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        from image_worker.kernels import reference

        return reference
    from image_worker.kernels import fused

    return fused

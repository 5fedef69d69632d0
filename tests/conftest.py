"""Shared by all tests: small pictures, and the miniature, built once per configuration."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():  # Triton then runs kernels in its interpreter; read at import
    os.environ["TRITON_INTERPRET"] = "1"

from image_worker.catalog import CATALOG, ModelEntry
from image_worker.model.build import Model, build
from image_worker.model.components import Component
from image_worker.model.hardware import detect_hardware
from image_worker.model.recipe import Recipe, read_component
from image_worker.settings import Precision, Settings

MINI = CATALOG["mini"]
MINI_FOLDER = Path(MINI.repo)


def make_picture(width: int = 128, height: int = 128, seed: int = 0) -> Image.Image:
    """A smooth random picture, RGB."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def build_mini(
    dtype: torch.dtype = torch.float32, entry: ModelEntry = MINI, **variables: str
) -> Model:
    """The miniature on the CPU, configured by environment variables."""
    settings = Settings.from_env({name.upper(): value for name, value in variables.items()})
    return build(settings, entry, detect_hardware(settings), dtype=dtype)


def read_mini(
    component: Component, dtype: torch.dtype, precision: Precision = "bf16", *, lora: bool = True
) -> Any:
    """A component of the miniature as its checkpoint has it, with Lightning merged."""
    settings = Settings.from_env({})
    loras = (MINI_FOLDER / MINI.lightning[8].path,) if lora else ()
    recipe = Recipe(settings, MINI, MINI_FOLDER, loras, torch.device("cpu"), dtype)
    return read_component(recipe, component, precision, whole=True).eval()


@functools.cache
def mini_model(dtype: torch.dtype = torch.float32, **variables: str) -> Model:
    """The same, built once for all tests."""
    return build_mini(dtype, **variables)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)

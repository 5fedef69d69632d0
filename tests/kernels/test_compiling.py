"""Triton's compiler takes every kernel, for each kind of card that multiplies FP8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("capability", ["89", "90", "120"])
def test_kernels_compile(capability: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kernels.compiling", capability]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("_kernel") == 7

"""Triton's compiler takes every kernel, for each kind of card that can run it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from image_worker.kernels import attention


# Kernels: those of int8, and from 8.9 on those of FP8, too; bytes that a program may share.
@pytest.mark.parametrize(
    ("capability", "kernels", "most"),
    [("80", 8, 163), ("86", 8, 99), ("89", 13, 99), ("90", 13, 227), ("120", 13, 99)],
)
def test_kernels_compile(capability: str, kernels: int, most: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kernels.compiling", capability]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("_kernel") == kernels
    shared = [int(line.rsplit(maxsplit=1)[1]) for line in done.stdout.splitlines()]
    assert 0 < max(shared) <= most * 1024


def test_attention_compiles_without_spilling_registers() -> None:
    log = io.StringIO()
    attention.compiled(log=log)
    assert "0 bytes spill stores, 0 bytes spill loads" in log.getvalue()
    assert "serialized" not in log.getvalue()  # products that wait for each other
    assert "injected" not in log.getvalue()  # waits for products, where ours are missing

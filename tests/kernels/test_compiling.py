"""Triton's compiler takes every kernel, for each kind of card that can run it."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from image_worker.kernels import attention
from image_worker.kernels.cuda import compiled

pytestmark = pytest.mark.long

# Kernels: those of int8, from 8.9 on those of FP8, and Hopper's own; KiB that a program may share.
CARDS = {"80": (16, 163), "89": (22, 99), "90": (32, 227), "120": (22, 99)}
# That compute the bits of their definitions, whose products are rounded before they are added to.
EXACT = r"{} _(decode|q8|q4_q5|k)_kernel "


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one program says of all cards: its imports take as long as a card's kernels."""
    command = [sys.executable, "-m", "tests.kernels.compiling", *CARDS]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("capability", CARDS)
def test_kernels_compile(capability: str, lines: list[str]) -> None:
    kernels, most = CARDS[capability]
    own = [line for line in lines if line.startswith(f"{capability} ")]
    assert len(own) == kernels
    shared = [int(line.rsplit(maxsplit=1)[1]) for line in own]
    assert 0 < max(shared) <= most * 1024
    exact = [line for line in own if re.match(EXACT.format(capability), line)]
    assert len(exact) >= 4 and all(" 0 fused products" in line for line in exact)


def test_attention_compiles_without_spilling_registers() -> None:
    log = io.StringIO()
    compiled("attention_sm90.cu", attention.ATTENTION_SIZES, log=log)
    assert "0 bytes spill stores, 0 bytes spill loads" in log.getvalue()
    assert "serialized" not in log.getvalue()  # products that wait for each other
    assert "injected" not in log.getvalue()  # waits for products, where ours are missing


def test_tiles_compile_within_half_of_the_registers() -> None:
    log = io.StringIO()
    compiled("tiles_sm90.cu", attention.TILES_SIZES, log=log)
    used = re.search(r"Used (\d+) registers", log.getvalue())
    assert used and int(used[1]) <= 64  # so that two blocks share a multiprocessor
    spilled = re.search(r"(\d+) bytes spill stores", log.getvalue())
    assert spilled and int(spilled[1]) <= 16

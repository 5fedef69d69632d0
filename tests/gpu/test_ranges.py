"""Activation ranges recorded on a card, the miniature's. Run by `make test-gpu`."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from image_worker.bench.ways import relative
from image_worker.model import ranges
from image_worker.model.components import TRANSFORMER
from image_worker.model.packed import slots
from image_worker.model.stream import Held
from image_worker.model.transformer import Transformer, velocities
from tests import upstream
from tests.conftest import read_mini
from tests.model.test_ranges import ROWS, UNREAD, run_stock

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda")
TOLERANCE = 0.05  # bf16, rounded in other places; of CPUs' two ways it is 0.02


@pytest.mark.parametrize("streamed", [(), (1, 2, 5, 6)])
def test_a_card_records_what_upstreams_layers_read(streamed: tuple[int, ...]) -> None:
    of = read_mini(TRANSFORMER, torch.bfloat16).to(CARD)
    served = Transformer(copy.deepcopy(of), CARD, torch.bfloat16, round_to=None).eval()
    held = {n: Held.of(list(slots(served.blocks[n])), CARD) for n in streamed}
    served.blocks.stream(held, CARD)
    rows = [replace(row, image=_there(row.image), text=_there(row.text)) for row in ROWS]
    with ranges.watch_served(served) as found:
        velocities(served, rows)
    stock = upstream.transformer(of)
    with torch.no_grad(), ranges.watch(stock, ranges.layers_of(of.config)) as expected:
        for row in rows:
            run_stock(stock, row)
    ours, theirs = found.ranges(), expected.ranges()
    assert set(ours) == set(theirs) - UNREAD
    for name, values in ours.items():
        assert relative(values, theirs[name]) <= TOLERANCE, name


def _there(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(CARD, torch.bfloat16)

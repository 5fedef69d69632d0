"""What is remembered, and for how long."""

from __future__ import annotations

import torch
from torch import Tensor

from image_worker.model.remembered import Remembered

CPU = torch.device("cpu")


def made(value: float, length: int = 10) -> Tensor:
    """4 bytes for each of `length` values."""
    return torch.full((length,), float(value))


def get(remembered: Remembered, key: bytes, value: float, length: int = 10) -> float:
    found = remembered.get(key, lambda: made(value, length), CPU)
    assert found.shape == (length,)
    return float(found[0])


def test_what_was_made_is_not_made_again() -> None:
    remembered = Remembered(100)
    found = [get(remembered, key, value) for key, value in ((b"a", 1), (b"a", 2), (b"b", 3))]
    assert found == [1, 1, 3]
    assert (remembered.hits, remembered.misses) == (1, 2)


def test_the_ones_used_last_are_kept() -> None:
    remembered = Remembered(100)
    get(remembered, b"a", 1)
    get(remembered, b"b", 2)
    get(remembered, b"a", 0)
    get(remembered, b"c", 3)  # there is room for two
    assert [get(remembered, b"a", -1), get(remembered, b"c", -1)] == [1, 3]
    assert get(remembered, b"b", -1) == -1


def test_what_is_larger_than_all_room_drives_nothing_out() -> None:
    remembered = Remembered(100)
    get(remembered, b"a", 1)
    get(remembered, b"large", 2, length=26)
    assert get(remembered, b"a", -1) == 1 and get(remembered, b"large", -1, length=26) == -1


def test_without_room_nothing_is_kept() -> None:
    remembered = Remembered(0)
    assert [get(remembered, b"a", 1), get(remembered, b"a", 2)] == [1, 2]


def test_what_is_kept_is_nobodys_view() -> None:
    remembered = Remembered(100)
    whole = torch.zeros(1000)
    remembered.get(b"a", lambda: whole[:10], CPU)
    whole.fill_(7)
    found = remembered.get(b"a", lambda: whole[:10], CPU)
    assert (found == 0).all() and found.untyped_storage().nbytes() == 40

"""What all threads may hold at a time: given out in order, and given back whatever happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from image_worker.job.budget import Budget
from tests.waiting import SECONDS, eventually


class Users:
    """Threads that take of a budget until they are told to stop. holding: what, in its order."""

    def __init__(self, budget: Budget) -> None:
        self.holding: list[int] = []
        self._budget = budget

    def ask(self, amount: int) -> Callable[[], None]:
        """Returns once the amount is held, or waited for. The result gives it back."""
        stop, before = threading.Event(), self._known()

        def hold() -> None:
            with self._budget.take(amount):
                self.holding.append(amount)
                stop.wait(SECONDS)
                self.holding.remove(amount)

        thread = threading.Thread(target=hold)
        thread.start()
        eventually(lambda: self._known() == before + 1)

        def release() -> None:
            stop.set()
            thread.join(SECONDS)

        return release

    def hold(self, *amounts: int) -> None:
        """Returns once these are held, in this order."""
        eventually(lambda: self.holding == list(amounts))

    def _known(self) -> int:
        return len(self.holding) + len(self._budget._queue)


def test_a_budget_is_given_out_in_the_order_of_asking() -> None:
    users = Users(Budget(10))
    first, second = users.ask(6), users.ask(4)
    users.hold(6, 4)
    large, small = users.ask(5), users.ask(1)
    second()
    time.sleep(0.1)
    assert users.holding == [6], "the small one would fit, but does not overtake the large one"
    first()
    users.hold(5, 1)
    large()
    small()


def test_what_is_larger_than_the_budget_goes_alone() -> None:
    users = Users(Budget(10))
    small, large = users.ask(1), users.ask(1000)
    time.sleep(0.1)
    assert users.holding == [1]
    small()
    users.hold(1000)
    later = users.ask(1)
    time.sleep(0.1)
    assert users.holding == [1000]
    large()
    users.hold(1)
    later()


def test_an_error_gives_back_what_was_taken() -> None:
    budget = Budget(10)
    with pytest.raises(ValueError), budget.take(10):
        raise ValueError
    users = Users(budget)
    release = users.ask(10)
    users.hold(10)
    release()


def test_who_gives_up_waiting_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(10)

    def interrupted(_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(budget._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), budget.take(10):
            pass
    users = Users(budget)
    release = users.ask(10)
    users.hold(10)
    release()

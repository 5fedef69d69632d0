"""The engine: who is on the card when."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from PIL import Image

from image_worker.engine import Engine
from image_worker.errors import CardLost
from tests.pictures import psnr
from tests.staged import SECONDS, Stage, alone, model_of, order, pixels, same, tokens_of


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    made = Stage(monkeypatch)
    yield made
    made.run_on()
    made.engine.close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(model_of(), 4, patience=0.0)
    yield made
    made.close()


def test_a_job_joins_between_two_steps_and_leaves_when_it_is_done(stage: Stage) -> None:
    long = stage.engine.submit(order(seed=1, steps=5))
    stage.reach_step()
    short = stage.engine.submit(order(seed=2, steps=2))
    stage.run_on()
    made = [long.result(SECONDS), short.result(SECONDS)]
    assert stage.together == [1, 2, 2, 1, 1]
    assert [round(m.together, 2) for m in made] == [1.4, 2.0]
    for given, future in ((order(seed=1, steps=5), long), (order(seed=2, steps=2), short)):
        assert same(pixels(future), alone(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_changes_no_picture(dtype: torch.dtype) -> None:
    asked = [
        (4, (128, 128), "blur it"),
        (8, (128, 96), "swap the colours of the red circle and the blue star"),
        (2, (128, 128), "remove the red circle"),
        (6, (96, 128), "make it darker"),
        (3, (64, 64), "mirror the picture"),
        (5, (128, 128), "make the background pink"),
    ]
    if dtype == torch.bfloat16:  # takes this CPU several times as long
        asked = [((n + 1) // 2, (w // 2, h // 2), prompt) for n, (w, h), prompt in asked]
    orders = [order(seed, *given, dtype=dtype) for seed, given in enumerate(asked)]
    shared = Engine(model_of(dtype), 4, patience=0.0)
    futures = [shared.submit(given) for given in orders]
    together = [future.result(SECONDS) for future in futures]
    shared.close()
    assert max(made.together for made in together) > 1
    for given, made in zip(orders, together, strict=True):
        lone, kept = alone(given, dtype), made.pixels[0]
        found = psnr(Image.fromarray(lone.numpy()), Image.fromarray(kept.numpy()))
        assert found >= (80 if dtype == torch.float32 else 45)


def test_none_overtakes_and_none_waits_for_more_than_those_before(stage: Stage) -> None:
    stage.engine.limits.enough = 2 * tokens_of(order())
    first = stage.engine.submit(order(seed=1, steps=3))
    stage.reach_step()
    large = stage.engine.submit(order(seed=2, steps=2, size=(256, 256)))  # too large to join
    later = [stage.engine.submit(order(seed=seed, steps=2)) for seed in (3, 4)]
    stage.run_on()
    for future in (first, large, *later):
        future.result(SECONDS)
    assert stage.together == [1, 1, 1, 1, 1, 2, 2]


def test_no_more_pictures_than_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, batch_size=2)
    futures = [stage.engine.submit(order(seed=seed, steps=1)) for seed in range(4)]
    several = stage.engine.submit(order(seed=9, steps=1, pictures=3))
    stage.run_on()
    assert len(several.result(SECONDS).pixels) == 3
    for future in futures:
        future.result(SECONDS)
    stage.engine.close()
    assert max(stage.together[:-1]) <= 2 and stage.together[-1] == 3


def test_where_weights_pass_at_every_step_a_batch_waits_for_announced_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch, streamed=frozenset({"transformer/blocks.00"}))
    assert stage.engine.limits.enough is None, "whoever shares a pass gains"
    with stage.engine.announced():
        first = stage.engine.submit(order(seed=1, steps=2))
        second = stage.engine.submit(order(seed=2, steps=1))
    stage.reach_step()
    late = stage.engine.submit(order(seed=3, steps=1))
    stage.run_on()
    for future in (first, second, late):
        future.result(SECONDS)
    stage.engine.close()
    assert stage.together == [2, 2]


def test_a_batchs_worth_of_jobs_is_begun_ahead_each_tried_once(stage: Stage) -> None:
    stage.engine.submit(order())
    stage.reach_step()
    ahead = [stage.engine.submit(order(seed=seed, pictures=2)) for seed in range(4)]
    cancelled, *_ = stage.engine._waiting
    ahead[0].cancel()
    second, third = list(stage.engine._waiting)[1:3]
    assert stage.engine._next_ahead() is second
    second.tried_ahead = True
    assert cancelled.load.pictures + second.load.pictures == stage.engine.limits.pictures
    assert stage.engine._next_ahead() is None
    stage.engine._waiting.remove(cancelled)
    assert stage.engine._next_ahead() is third
    third.tried_ahead = True
    assert stage.engine._next_ahead() is None


def test_a_lone_job_waits_for_nobody(stage: Stage) -> None:
    job = stage.engine.submit(order())
    stage.run_on()
    assert job.result(SECONDS).seconds["wait"] < 4  # patience is 5


def test_a_job_is_cancelled_in_the_queue_and_between_steps(stage: Stage) -> None:
    stage.engine.limits.enough = 2 * tokens_of(order())
    kept = stage.engine.submit(order(seed=1, steps=4))
    stage.reach_step()
    running = stage.engine.submit(order(seed=2, steps=4))
    large = stage.engine.submit(order(seed=3, size=(256, 256)))
    stage.step()
    stage.reach_step()  # both are on the card
    assert running.cancel() and large.cancel()
    stage.run_on()
    assert len(kept.result(SECONDS).pixels) == 1
    assert stage.together == [1, 2, 1, 1]
    with pytest.raises(CancelledError):
        running.result(SECONDS)
    assert pixels(stage.engine.submit(order(seed=4))).shape == (128, 128, 3)


def test_progress_and_previews(engine: Engine) -> None:
    told: list[tuple[int, int, torch.Tensor | None]] = []
    watched = order(steps=3, watcher=lambda *given: told.append(given), previews=True)
    final = pixels(engine.submit(watched))
    assert [given[:2] for given in told] == [(1, 3), (2, 3), (3, 3)]
    first, second, last = (given[2] for given in told)
    assert first is not None and second is not None and last is None
    assert first.shape == final.shape and first.dtype == torch.uint8
    # It shows where this picture is going, not another.
    other = pixels(engine.submit(order(seed=7)))
    for shown in (first, second):
        distances = [(shown.float() - end.float()).square().mean() for end in (final, other)]
        assert distances[0] < 0.5 * distances[1]


def test_a_watcher_that_fails_costs_nothing(engine: Engine) -> None:
    def watcher(*_: Any) -> None:
        raise RuntimeError("the event loop is closed")

    assert same(pixels(engine.submit(order(watcher=watcher))), alone(order()))


def test_closing_cancels_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    job = stage.engine.submit(order(steps=50))
    stage.reach_step()
    stage.run_on()
    stage.engine.close()
    assert job.cancelled() or job.done()
    with pytest.raises(CardLost):
        stage.engine.submit(order())

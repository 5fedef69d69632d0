"""The engine: who is on the card when, and that nobody's misfortune is another's."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
import torch
from PIL import Image

from image_worker import blame
from image_worker import engine as engine_module
from image_worker.edit import conditions, fitting
from image_worker.edit import denoise as denoise_module
from image_worker.engine import Engine
from image_worker.errors import BrokenPicture, CardLost, OutOfMemory
from image_worker.model.build import Model
from image_worker.model.placement import RESERVE
from image_worker.model.remembered import Remembered
from image_worker.orders import Made, Order
from tests.conftest import make_picture, mini_model
from tests.pictures import psnr

SECONDS = 60


def model_of(dtype: torch.dtype = torch.float32) -> Model:
    return mini_model(dtype)


def order(
    seed: int = 0,
    steps: int = 3,
    size: tuple[int, int] = (128, 128),
    prompt: str = "make the red circle blue",
    *,
    dtype: torch.dtype = torch.float32,
    pictures: int = 1,
    references: int = 1,
    negative: str | None = None,
    **options: Any,
) -> Order:
    reference = conditions.as_reference(model_of(dtype), make_picture(seed=seed))
    prepared = conditions.prepare(model_of(dtype), prompt, negative, [reference] * references)
    seeds = [seed + number for number in range(pictures)]
    return Order(prepared, size, seeds, steps, 1.0, **options)


class Stage:
    """An engine whose steps are taken when the test says so.

    together: of each step, how many pictures took it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch_size: int = 4, **plan: Any) -> None:
        model = model_of()
        self.model = dataclasses.replace(
            model,
            plan=dataclasses.replace(model.plan, **plan),
            encodings=Remembered(10**8),  # other tests' are of no use here
        )
        self.together: list[int] = []
        self._go, self._ready = threading.Semaphore(0), threading.Semaphore(0)
        stock = engine_module.step

        def step(model: Model, pictures: Sequence[Any], limits: Any) -> list[int]:
            self._ready.release()
            assert self._go.acquire(timeout=SECONDS)
            self.together.append(len(pictures))
            return stock(model, pictures, limits)

        monkeypatch.setattr(engine_module, "step", step)
        self.engine = Engine(self.model, batch_size, patience=5.0)

    def reach_step(self) -> None:
        """Returns when the engine is about to take a step."""
        assert self._ready.acquire(timeout=SECONDS)

    def step(self, count: int = 1) -> None:
        """Lets a step that was reached happen, and waits for the next ones."""
        for number in range(count):
            if number:
                self.reach_step()
            self._go.release()

    def run_on(self) -> None:
        for _ in range(1000):
            self._go.release()


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


def pixels(future: Future[Made]) -> torch.Tensor:
    return future.result(SECONDS).pixels[0]


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal but for how float32 rounds in other company."""
    return bool((first.int() - second.int()).abs().max() <= 1)


def alone(given: Order, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    single = Engine(model_of(dtype), 1, patience=0.0)
    try:
        return pixels(single.submit(given))
    finally:
        single.close()


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


def test_memory_that_runs_out_splits_a_batch_and_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []
    stock = denoise_module.velocities

    def velocities(module: Any, rows: Sequence[Any], *rest: Any) -> Any:
        counts.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(module, rows, *rest)

    stage = Stage(monkeypatch)
    monkeypatch.setattr(denoise_module, "velocities", velocities)
    orders = [order(seed=seed, steps=2) for seed in range(4)]
    futures = [stage.engine.submit(given) for given in orders]
    stage.run_on()
    found = [pixels(future) for future in futures]
    # What was tried first: everyone who had arrived. Afterwards, never more than two.
    assert sum(count > 2 for count in counts) <= 2
    for given, made in zip(orders, found, strict=True):
        assert same(made, alone(given))
    counts.clear()
    again = [stage.engine.submit(order(seed=seed, steps=2)) for seed in range(4)]
    for future in again:
        future.result(SECONDS)
    stage.engine.close()
    assert max(counts) <= 2


def test_only_the_job_that_does_not_fit_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = denoise_module.velocities

    def velocities(module: Any, rows: Sequence[Any], *rest: Any) -> Any:
        if any(len(row.image) > 130 for row in rows):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(module, rows, *rest)

    monkeypatch.setattr(denoise_module, "velocities", velocities)
    stage = Stage(monkeypatch)
    good = [stage.engine.submit(order(seed=seed)) for seed in (1, 2)]
    stage.reach_step()
    bad = stage.engine.submit(order(seed=3, size=(144, 128)))
    stage.run_on()
    with pytest.raises(OutOfMemory, match="smaller size"):
        bad.result(SECONDS)
    for future in good:
        future.result(SECONDS)
    stage.engine.close()


def with_room_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """On a card that holds a forward of so many tokens, and no more."""
    stock = denoise_module.velocities

    def velocities(module: Any, rows: Sequence[Any], *rest: Any) -> Any:
        if sum(len(row.image) + len(row.text) for row in rows) > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(module, rows, *rest)

    stage = Stage(monkeypatch, token_bytes=1000)
    monkeypatch.setattr(denoise_module, "velocities", velocities)
    monkeypatch.setattr(fitting, "free_memory", lambda: RESERVE + 1000 * tokens)
    stage.run_on()
    return stage


def tokens_of(given: Order) -> int:
    lengths = conditions.row_lengths(model_of(), given.prepared, given.size, 1)
    return max(length.total for length in lengths)


def test_a_job_that_does_not_fit_is_told_a_size_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    large, smaller = order(size=(256, 128)), order(size=(160, 80))
    stage = with_room_for(tokens_of(smaller) + 3, monkeypatch)
    with pytest.raises(OutOfMemory, match="160x80 instead of 256x128 would fit"):
        stage.engine.submit(large).result(SECONDS)
    assert pixels(stage.engine.submit(smaller)).shape == (80, 160, 3)
    stage.engine.close()


def test_the_longer_prompt_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def guided(size: tuple[int, int]) -> Order:
        long = "a blue circle and a red star on a green background, far apart"
        return dataclasses.replace(order(size=size, negative=long), cfg_scale=4.0)

    stage = with_room_for(tokens_of(guided((144, 144))), monkeypatch)
    with pytest.raises(OutOfMemory, match="144x144 instead of 256x256 would fit"):
        stage.engine.submit(guided((256, 256))).result(SECONDS)
    assert pixels(stage.engine.submit(guided((144, 144)))).shape == (144, 144, 3)
    stage.engine.close()


def test_where_no_size_fits_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = with_room_for(tokens_of(order(size=(64, 64))) - 1, monkeypatch)
    with pytest.raises(OutOfMemory, match=r"no result of this shape fits$"):
        stage.engine.submit(order()).result(SECONDS)
    with pytest.raises(OutOfMemory, match="beside 3 pictures; use fewer of them"):
        stage.engine.submit(order(references=3)).result(SECONDS)
    stage.engine.close()


def test_a_forecast_that_was_wrong_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = with_room_for(10, monkeypatch)
    monkeypatch.setattr(fitting, "free_memory", lambda: RESERVE + 1000 * tokens_of(order()))
    with pytest.raises(OutOfMemory, match="use a smaller size"):
        stage.engine.submit(order()).result(SECONDS)
    stage.engine.close()


def test_one_jobs_bad_numbers_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    stock = engine_module.start

    def start(model: Model, *given: Any, seed: int, **options: Any) -> Any:
        picture = stock(model, *given, seed=seed, **options)
        if seed == 2:
            picture.latents = picture.latents * float("nan")
        return picture

    monkeypatch.setattr(engine_module, "start", start)
    with stage.engine.announced():
        futures = [stage.engine.submit(order(seed=seed)) for seed in (1, 2, 3)]
    stage.run_on()
    with pytest.raises(BrokenPicture):
        futures[1].result(SECONDS)
    for number in (0, 2):
        assert same(pixels(futures[number]), alone(order(seed=number + 1)))
    stage.engine.close()


def test_an_unforeseen_failure_in_company_is_one_jobs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = denoise_module.velocities
    prompt = "swap the colours of the red star and the blue circle"
    culprit = order(seed=2, prompt=prompt)
    (length,) = conditions.row_lengths(model_of(), culprit.prepared, (128, 128), 1)

    def velocities(module: Any, rows: Sequence[Any], *rest: Any) -> Any:
        if any(len(row.text) == length.text for row in rows):
            raise ValueError("this one" if len(rows) == 1 else "someone")
        return stock(module, rows, *rest)

    monkeypatch.setattr(denoise_module, "velocities", velocities)
    stage = Stage(monkeypatch)
    good = stage.engine.submit(order(seed=1, prompt="blur it"))
    stage.reach_step()
    bad = stage.engine.submit(culprit)
    stage.run_on()
    assert len(good.result(SECONDS).pixels) == 1
    with pytest.raises(ValueError, match="this one"):
        bad.result(SECONDS)
    stage.engine.close()


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


def test_a_lost_card_answers_everyone_and_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch)
    running = stage.engine.submit(order(seed=1))
    stage.reach_step()
    waiting = stage.engine.submit(order(seed=2, size=(256, 256)))
    monkeypatch.setattr(blame, "card_is_lost", lambda: True)

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(denoise_module, "velocities", fail)
    stage.run_on()
    for future in (running, waiting):
        with pytest.raises(CardLost):
            future.result(SECONDS)
    assert stage.engine.lost
    with pytest.raises(CardLost):
        stage.engine.submit(order())


def test_a_card_lost_while_a_job_begins_answers_that_job(
    monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(blame, "card_is_lost", lambda: True)
    monkeypatch.setattr(engine_module, "encode_prompts", fail)
    with pytest.raises(CardLost):
        engine.submit(order()).result(SECONDS)


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

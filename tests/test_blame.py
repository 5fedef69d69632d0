"""Whose failure it is: nobody's misfortune is another's, and a lost card is everyone's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest
import torch

from image_worker import blame
from image_worker import engine as engine_module
from image_worker.edit import conditions, fitting
from image_worker.edit import denoise as denoise_module
from image_worker.engine import Engine
from image_worker.errors import BrokenPicture, CardLost, OutOfMemory
from image_worker.model.build import Model
from image_worker.model.placement import RESERVE
from image_worker.orders import Order
from tests.staged import SECONDS, Stage, alone, model_of, order, pixels, same, tokens_of


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(blame, "card_is_lost", lambda: True)
    monkeypatch.setattr(engine_module, "encode_prompts", fail)
    with closing(Engine(model_of(), 4, patience=0.0)) as engine, pytest.raises(CardLost):
        engine.submit(order()).result(SECONDS)

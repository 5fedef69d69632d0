"""What the miniature is trained with: the served model's own arithmetic, an optimiser, LoRAs."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from random import Random
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from image_worker.edit import conditions
from image_worker.edit.decode import decode
from image_worker.edit.denoise import Picture
from image_worker.kernels.reference import decode_nf4
from image_worker.model.components import TEXT_ENCODER, TRANSFORMER
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.hardware import detect_hardware
from image_worker.model.lora import Lora
from image_worker.model.transformer import Row, velocities
from image_worker.model.vae import last_frame
from image_worker.settings import Settings
from tests import upstream
from tests.conftest import mini_model, read_mini
from tests.pictures import psnr
from tools.miniature import package
from tools.miniature.edits import ONE_PICTURE, TWO_PICTURES, training_edit
from tools.miniature.render import to_image, to_picture
from tools.miniature.train import __main__ as main
from tools.miniature.train import autoencoder, data, editor, loras
from tools.miniature.train.data import Pairs, draw_shard, encode_shard, shard_of
from tools.miniature.train.optimiser import Optimiser
from tools.miniature.train.rounding import Rounding, nf4

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


def shard(kinds: tuple[str, ...], count: int) -> Any:
    return shard_of([training_edit(Random(number), kinds) for number in range(count)])


@functools.cache
def pairs(kinds: tuple[str, ...]) -> Pairs:
    model = mini_model(torch.bfloat16, use_lightning_lora="0")
    return encode_shard(
        shard(kinds, 2),
        lambda drawn: autoencoder.encode(model.vae, drawn),
        upstream.tokenizer(),
        CPU,
    )


def served_editor() -> editor.Editor:
    transformer = upstream.transformer(read_mini(TRANSFORMER, torch.bfloat16, lora=False))
    return editor.of(upstream.text_encoder(torch.bfloat16), transformer, upstream.tokenizer())


@pytest.mark.parametrize("kinds", [ONE_PICTURE, TWO_PICTURES])
def test_a_batchs_velocities_are_the_served_ones(kinds: tuple[str, ...]) -> None:
    trained, batch = served_editor(), pairs(kinds)
    transformer = mini_model(torch.bfloat16, use_lightning_lora="0").transformer
    torch.manual_seed(0)
    latents, times = torch.randn(2, 64, 64), torch.tensor([0.95, 0.2])
    with torch.inference_mode():
        text = editor.encode(trained, batch)
        found = editor.velocity(trained, batch, text, latents, times).float()
    shapes = ((1, 8, 8),) * (1 + batch.layout.pictures)
    for row in range(2):
        image = torch.cat([latents[row].bfloat16(), batch.shown[row]])
        words = text[row, : batch.lengths[row]]
        served = velocities(transformer, [Row(image, shapes, words, times[row].item())])
        error = (found[row] - served[0].float()).norm() / served[0].float().norm()
        assert error < 0.03  # bf16, and attention with a mask or without


def test_latents_are_the_served_ones() -> None:
    model = mini_model(torch.bfloat16)
    answers = draw_shard(shard(ONE_PICTURE, 2), CPU).answers
    found = autoencoder.encode(model.vae, answers)
    for picture, latents in zip(answers, found, strict=True):
        served = conditions.encode(model, "", None, [to_image(picture)]).references
        assert (latents - served).float().abs().max() < 0.15  # bf16, of values of size 1
    drawn = autoencoder.decode(model.vae, found)
    for picture, latents, before in zip(drawn, found, answers, strict=True):
        done = Picture(None, (1, 8, 8), latents, [0.0], [], 1.0)  # type: ignore[arg-type]
        assert psnr(to_image(picture), decode(model, done)) > 45
        assert psnr(to_image(picture), to_image(before)) > 30


def test_the_loss_reaches_every_part() -> None:
    trained, batch = served_editor(), pairs(ONE_PICTURE)
    for module in trained.modules():
        module.requires_grad_(True)
    torch.manual_seed(0)
    loss = editor.flow_loss(trained, batch)
    loss.backward()
    assert 0 < loss.item() < 1  # the trained model's; an untrained one has 2
    last = len(trained.transformer.transformer_blocks) - 1
    unread = [
        f"blocks.{last}.{part}"
        for part in ("txt_mlp", "attn.to_add_out", "attn.add_q_proj", "attn.norm_added_q")
    ]
    for module in trained.modules():
        for name, parameter in module.named_parameters():
            if not any(part in name for part in unread):
                assert parameter.grad is not None and parameter.grad.any(), name


def test_an_empty_instruction_is_the_served_one() -> None:
    trained, batch = served_editor(), pairs(ONE_PICTURE)
    ids, lengths = trained.blank(batch.layout)
    model = mini_model(torch.bfloat16)
    image = to_image(batch.seen[0, 0] / 255)
    served = conditions.encode(model, "x", " ", [image]).negative
    assert served is not None and lengths.item() == len(served)
    assert ids.shape == (1, batch.layout.length)


def problem() -> tuple[torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 32), torch.randn(256, 64)


def run(layer: torch.nn.Linear, x: torch.Tensor, update: Optimiser, numbers: range) -> float:
    goal = x[:, :32].sin()
    loss = torch.zeros(())
    for number in numbers:
        loss = (layer(x) - goal).square().mean()
        loss.backward()
        update.set_rate(0.05, number, 100)
        update.step()
    return loss.item()


@pytest.mark.parametrize("muon", [True, False])
def test_the_optimiser_learns_and_goes_on_where_it_stopped(muon: bool) -> None:
    def start() -> tuple[torch.nn.Linear, torch.Tensor, Optimiser]:
        layer, x = problem()
        matrices = [layer.weight] if muon else []
        others = [p for p in layer.parameters() if not (muon and p is layer.weight)]
        return layer, x, Optimiser(matrices, others)

    layer, x, update = start()
    before = run(layer, x, update, range(1))
    run(layer, x, update, range(1, 50))
    state = {name: _copied(value) for name, value in update.state().items()}
    after = run(layer, x, update, range(50, 100))
    assert after < 0.3 * before
    again, x, second = start()
    second.load(state)
    assert run(again, x, second, range(50, 100)) == pytest.approx(after, rel=1e-4)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_copied(part) for part in value]
    return value


def test_a_student_trains_the_lora_alone_as_it_is_served(tmp_path: Path) -> None:
    teacher, batch = served_editor(), pairs(ONE_PICTURE)
    student = loras.Student(teacher)
    for number in range(2):
        torch.manual_seed(number)
        editor.flow_loss(student.editor, batch, train_text=False).backward()
        student.set_rate(1e-2, number, 10)
        student.step()
    path = tmp_path / "trained.safetensors"
    save_file(student.tensors(), path)
    lora = Lora.read(path)
    lora.check_fits(teacher.transformer)
    changed = 0
    before = dict(teacher.transformer.named_parameters())
    for name, after in student.editor.transformer.named_parameters():
        module = name.removesuffix(".weight")
        merged = lora.merge(module, before[name].detach())
        assert (merged - after).float().abs().max() < 0.01
        changed += not torch.equal(before[name], after)
    assert 0 < changed <= len(lora.pairs)


def test_a_students_gradients_are_those_of_its_factors() -> None:
    torch.manual_seed(0)
    up = torch.randn(6, loras.RANK, requires_grad=True)
    down = torch.randn(loras.RANK, 5, requires_grad=True)
    x, scale = torch.randn(7, 5), loras.ALPHA / loras.RANK
    weight = scale * up @ down
    weight.retain_grad()
    (x @ weight.T).sin().sum().backward()
    found = loras.factor_gradients(weight.grad, up.detach(), down.detach())
    torch.testing.assert_close(found[0], up.grad)
    torch.testing.assert_close(found[1], down.grad)


def test_a_folded_autoencoder_is_packaged_whole(tmp_path: Path) -> None:
    vae = autoencoder.new()
    autoencoder.set_statistics(vae, [0.5] * 16, [2.0] * 16)
    autoencoder.save(vae, tmp_path)
    full = package.whole_vae(tmp_path).bfloat16()
    expected = load_file(tmp_path / "vae.safetensors")
    assert full.state_dict().keys() == expected.keys()
    for name, tensor in full.state_dict().items():
        assert torch.equal(last_frame(tensor), expected[name]), name
    assert full.config.latents_std == [2.0] * 16
    loaded = autoencoder.load(tmp_path, CPU)
    picture = to_picture(to_image(torch.rand(3, 128, 128)))[None]
    assert torch.equal(autoencoder.encode(loaded, picture), autoencoder.encode(vae, picture))


@pytest.mark.skipif(
    not detect_hardware(Settings.from_env({})).has_bf16,
    reason="training is in bf16, which takes this CPU minutes for a few steps",
)
def test_the_whole_training_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps of every stage on a CPU, twice into the same folder, and the model packaged."""
    monkeypatch.setattr(data, "SHARD", 8)
    monkeypatch.setattr(
        main, "make_shards", lambda kinds, count, seed: iter([shard(kinds, 8)] * count)
    )
    for module, name in ((autoencoder, "BATCH"), (editor, "BATCH"), (loras, "BATCH")):
        monkeypatch.setattr(module, name, 2)
    monkeypatch.setattr(loras, "WALKS", 2)
    monkeypatch.setattr(main, "LIKE_TRAINING", 24)
    monkeypatch.setattr(editor, "LOOK_EVERY", 2)
    steps = ("--vae-steps=2", "--editor-steps=4", "--lightning-steps=1", "--style-steps=1")
    command = ["train", str(tmp_path), "--device=cpu", "--shards=2", "--per-kind=1", *steps]
    monkeypatch.setattr(sys, "argv", command)
    with torch.compiler.set_stance("force_eager"):
        main.main()
        first = load_file(tmp_path / "transformer.safetensors")
        (tmp_path / "transformer.safetensors").unlink()  # as if the run had been broken off
        main.main()
    log = (tmp_path / "log.txt").read_text()
    assert log.count("vae step") == 0 and "going on from step 4" in log
    again = load_file(tmp_path / "transformer.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    monkeypatch.setattr(sys, "argv", ["package", str(tmp_path), str(tmp_path / "model")])
    package.main()
    for name in ("loras/miniature-outlined-style-bf16.safetensors", "vae/config.json"):
        assert (tmp_path / "model" / name).exists()


def test_nf4_is_what_is_served() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128, dtype=torch.bfloat16)
    quantised, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    assert torch.equal(nf4(weight), bnb.dequantize_4bit(quantised, state))


def test_those_weights_are_rounded_that_are_quantised_when_served() -> None:
    plain = served_editor()
    expected = editor.rounded(plain)
    plain_of = {id(expected.text): plain.text, id(expected.transformer): plain.transformer}
    found = 0
    for component, like in ((TEXT_ENCODER, expected.text), (TRANSFORMER, expected.transformer)):
        module = read_mini(component, torch.bfloat16, "4bit", lora=False)
        for name, layer in module.named_modules():
            if isinstance(layer, CodedLinear):
                kept = torch.empty(layer.weight.shape, dtype=torch.bfloat16)
                decode_nf4(layer.weight, kept)
                wanted = like.get_submodule(name).weight
                assert torch.equal(kept, wanted)
                unscaled = nf4(plain_of[id(like)].get_submodule(name).weight)
                assert (kept - unscaled).norm() / kept.norm() < 0.02  # scales are rounded, too
                found += 1
    assert found == len(plain.quantised_weights())


def test_weights_are_rounded_as_often_as_asked_and_all_at_once() -> None:
    torch.manual_seed(0)
    plain = [torch.randn(64, 64), torch.randn(32, 128)]
    weights = [weight.clone() for weight in plain]
    rounding = Rounding(weights)
    counts = {0.0: 0, 0.5: 0, 1.0: 0}
    for share in counts:
        rounding.set_share(share)
        for _ in range(40):
            for weight, value in zip(weights, plain, strict=True):
                weight.copy_(value)
            rounding()
            was = [torch.equal(w, nf4(value)) for w, value in zip(weights, plain, strict=True)]
            assert was[0] == was[1]
            counts[share] += was[0]
    assert counts[0.0] == 0 and 8 < counts[0.5] < 32 and counts[1.0] == 40

"""`python -m image_worker compare`: what is measured, in which order, and what stays of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from image_worker import __main__ as command
from image_worker.commands.compare import card_time, measuring
from image_worker.commands.compare.child import start
from image_worker.commands.compare.kernels import measure as measure_kernels
from image_worker.commands.compare.kernels import pairs
from image_worker.commands.compare.likeness import psnr
from image_worker.commands.compare.measuring import measure
from image_worker.commands.compare.process import Process, WayFailed
from image_worker.commands.compare.records import Records
from image_worker.commands.compare.results import results
from image_worker.commands.compare.trial import _identity, seeds_of
from image_worker.commands.compare.ways import parse
from image_worker.errors import InvalidSettings
from image_worker.kernels import fused, reference
from image_worker.settings import Settings
from tests.commands.compare.stub_process import CARD, MACHINE, SHAPE, Stubs, Watched, trial
from tests.conftest import MINI_FOLDER
from tests.worker_jobs import job, picture


def test_ways_are_precisions_files_or_settings() -> None:
    way, file, own = parse(["8bit", "q4=owner/repo:a.gguf@main", "a:CHECKPOINT=/x,y=1,COMPUTE=fp8"])
    assert dict(way.variables) == {"PRECISION_MODE": "8bit"}
    assert (file.name, dict(file.variables)) == ("q4", {"CHECKPOINT": "owner/repo:a.gguf@main"})
    assert dict(own.variables) == {"CHECKPOINT": "/x,y=1", "COMPUTE": "fp8"}
    assert [way.name for way in parse([])] == ["bf16", "fp8", "8bit", "svdq", "4bit"]
    both = parse(["bf16"], [Path("style.safetensors")])
    assert [way.name for way in both] == ["bf16", "bf16 + LoRA"]
    assert both[1].loras == (str(Path("style.safetensors").absolute()),)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["3bit"], "'3bit' is no way; allowed: bf16"),
        (["a:NO_SUCH=1"], "no setting 'NO_SUCH'"),
        (["a:4bit"], "no setting '4bit'"),
        (["a="], "is no way"),
        (["bf16", "bf16"], "two ways are called 'bf16'"),
    ],
)
def test_what_is_no_way_is_refused(texts: list[str], told: str) -> None:
    with pytest.raises(InvalidSettings, match=told):
        parse(texts)


def test_runs_and_seeds() -> None:
    assert seeds_of(None, None) == (1, 2, 3, 4, 5)
    assert seeds_of(6, [7, 8]) == (7, 8, 7, 8, 7, 8)
    assert len(seeds_of(None, range(9))) == 9
    with pytest.raises(InvalidSettings, match="at least 5 are needed; the range"):
        seeds_of(4, None)
    with pytest.raises(InvalidSettings, match="leaves some of the 6"):
        seeds_of(5, range(6))


def test_ways_take_turns_there_and_back(tmp_path: Path) -> None:
    stubs, watched, this = Stubs(), Watched(), trial(tmp_path, "bf16", "fp8", "4bit")
    measure(this, watched, stubs)
    assert stubs.runs()[:6] == ["bf16", "fp8", "4bit", "4bit", "fp8", "bf16"]
    assert (stubs.most, stubs.alive) == (3, [])
    assert (watched.rounds, watched.jobs) == (5, 18)
    found = results(this, "again")
    assert found["complete"] and "took turns" in found["order"]
    assert [way["against"] for way in found["ways"]] == [None, "bf16", "bf16"]
    assert found["ways"][0]["seconds"]["values"] == [1.1, 1.2, 1.3, 1.4, 1.5]
    assert found["ways"][0]["seconds"]["median"] == 1.3
    fp8, four = found["ways"][1:]
    assert fp8["pictures"][0]["psnr"] > 40 and not fp8["pictures"][0]["same"]
    assert four["pictures"][0]["same"] and four["pictures"][0]["psnr"] is None
    json.dumps(found, allow_nan=False)


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(trial(tmp_path, "bf16", "fp8"), Watched(interrupt=2), stopped := Stubs())
    assert stopped.alive == []
    partly = results(trial(tmp_path, "bf16", "fp8"), "again")
    assert not partly["complete"] and partly["ways"][0]["seconds"]["count"] == 2
    with (tmp_path / "results.jsonl").open("a") as stream:
        stream.write('{"kind": "run", "key": "cut o')
    measure(trial(tmp_path, "bf16", "fp8"), Watched(), later := Stubs())
    assert len(later.runs()) == 6
    measure(trial(tmp_path, "bf16", "fp8"), Watched(), none := Stubs())
    assert none.orders == []
    measure(trial(tmp_path, "bf16", "4bit", seeds=(1, 2, 3, 4, 5, 6)), Watched(), more := Stubs())
    assert sorted(more.runs()) == ["4bit"] * 6 + ["bf16"]


@pytest.mark.parametrize(
    "change",
    [{"code": "other"}, {"job": {"prompt": "other"}}, {"machine": MACHINE | {"threads": 2}}],
    ids=lambda change: next(iter(change)),
)
def test_another_trials_figures_are_not_taken(tmp_path: Path, change: Any) -> None:
    measure(trial(tmp_path, "bf16"), Watched(), Stubs())
    measure(trial(tmp_path, "bf16", **change), Watched(), again := Stubs())
    assert len(again.runs()) == 5


def test_other_settings_are_measured_again(tmp_path: Path, monkeypatch: Any) -> None:
    measure(trial(tmp_path, "bf16"), Watched(), Stubs())
    monkeypatch.setenv("LIGHTNING_STEPS", "4")
    measure(trial(tmp_path, "bf16"), Watched(), again := Stubs())
    assert len(again.runs()) == 5


def test_a_way_that_fails_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    def refuse(variables: Mapping[str, str], order: Mapping[str, Any]) -> dict[str, Any] | None:
        if variables.get("PRECISION_MODE") == "fp8":
            return {"error": {"type": "invalid_settings", "message": "no <fp8> here"}}
        return None

    measure(trial(tmp_path, "bf16", "fp8"), Watched(), Stubs(refuse))
    good, bad = results(trial(tmp_path, "bf16", "fp8"), "again")["ways"]
    assert good["error"] is None and good["seconds"]["count"] == 5
    assert bad["error"] == {"type": "invalid_settings", "message": "no <fp8> here"}
    measure(trial(tmp_path, "bf16", "fp8"), Watched(), Stubs())
    assert results(trial(tmp_path, "bf16", "fp8"), "again")["ways"][1]["error"] is None


def test_one_that_fails_later_keeps_its_runs(tmp_path: Path) -> None:
    def fail(variables: Mapping[str, str], order: Mapping[str, Any]) -> dict[str, Any] | None:
        if variables.get("PRECISION_MODE") == "fp8" and order.get("input", {}).get("seed") == 3:
            return {"error": {"type": "broken_picture", "message": "NaN"}}
        return None

    this = trial(tmp_path, "bf16", "fp8")
    measure(this, Watched(), stubs := Stubs(fail))
    bad = results(this, "again")["ways"][1]
    assert bad["error"]["type"] == "broken_picture" and bad["seconds"]["count"] == 2
    assert stubs.runs().count("bf16") == 5 and stubs.alive == []


def test_ways_that_do_not_fit_together_go_one_after_the_other(tmp_path: Path) -> None:
    stubs = Stubs()

    def answer(variables: Mapping[str, str], order: Mapping[str, Any]) -> dict[str, Any] | None:
        if order["do"] == "start" and len(stubs.alive) > 1:
            return {"error": {"type": "does_not_fit", "message": "no room"}}
        return None

    stubs.answer = answer
    this = trial(tmp_path, "bf16", "fp8")
    measure(this, Watched(), stubs)
    assert stubs.runs() == ["bf16"] * 5 + ["fp8"] * 5
    found = results(this, "again")
    assert "one after the other" in found["order"] and found["complete"]


def test_weights_that_pass_for_lack_of_room_do_not_count(tmp_path: Path) -> None:
    stubs = Stubs()

    def answer(variables: Mapping[str, str], order: Mapping[str, Any]) -> dict[str, Any] | None:
        if order["do"] == "start" and len(stubs.alive) > 1:
            return {"confined": True}
        return None

    stubs.answer = answer
    measure(trial(tmp_path, "bf16", "fp8"), Watched(), stubs)
    assert stubs.runs() == ["bf16"] * 5 + ["fp8"] * 5 and stubs.alive == []


def test_fresh_forgets_what_was_there(tmp_path: Path) -> None:
    measure(trial(tmp_path, "bf16", "fp8"), Watched(), Stubs())
    this = trial(tmp_path, "bf16", "fp8", records=Records(tmp_path / "results.jsonl", fresh=True))
    assert [way["pictures"] for way in results(this, "again")["ways"]] == [[], []]
    measure(this, Watched(), again := Stubs())
    assert len(again.runs()) == 10


def test_none_is_started_where_the_next_would_not_fit(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(measuring, "free_host_memory", lambda: 2**20)
    measure(trial(tmp_path, "bf16", "fp8"), Watched(), stubs := Stubs())
    assert stubs.most == 1 and stubs.runs() == ["bf16"] * 5 + ["fp8"] * 5


def test_loras_are_compared_with_loras(tmp_path: Path) -> None:
    this = trial(tmp_path, "bf16", "fp8", loras=[tmp_path / "style.safetensors"])
    measure(this, Watched(), Stubs())
    against = {way["name"]: way["against"] for way in results(this, "again")["ways"]}
    assert against["fp8"] == "bf16" and against["fp8 + LoRA"] == "bf16 + LoRA"
    assert against["bf16 + LoRA"] is None


def test_a_lora_is_merged_on_top_of_lightning() -> None:
    settings = Settings.from_env({"MODEL": "mini"})
    style = MINI_FOLDER / "loras" / "miniature-outlined-style-bf16.safetensors"
    found = []
    for loras in ([], [style]):
        worker = start(settings, loras)
        found.append(worker.run_blocking(job(seed=1)))
        worker.close()
    assert all(reply["lightning_enabled"] for reply in found)
    plain, styled = (np.asarray(picture(reply)) for reply in found)
    assert psnr(plain, styled) < 35


def test_without_bf16_the_first_way_is_compared_with(tmp_path: Path) -> None:
    this = trial(tmp_path, "8bit", "4bit")
    measure(this, Watched(), Stubs())
    assert [way["against"] for way in results(this, "again")["ways"]] == [None, "8bit"]


def test_kernels_are_measured_where_there_is_a_card(tmp_path: Path) -> None:
    timed = [{"name": "GELU", "fused": 1.0, "reference": 4.0}]

    def answer(variables: Mapping[str, str], order: Mapping[str, Any]) -> dict[str, Any] | None:
        return {"pairs": timed} if order["do"] == "kernels" else None

    this = trial(tmp_path, "bf16", machine=MACHINE | {"card": CARD})
    assert results(this, "again")["kernels"] == {"problem": "not measured yet"}
    measure(this, Watched(), Stubs(answer))
    assert results(this, "again")["kernels"] == {"pairs": timed}
    assert results(trial(tmp_path, "bf16"), "again")["kernels"] == {"problem": "no card"}


def test_where_the_cards_time_goes_is_looked_at_once(tmp_path: Path) -> None:
    on_card = MACHINE | {"card": CARD}

    def answer(variables: Mapping[str, str], order: Mapping[str, Any]) -> dict[str, Any] | None:
        if order["do"] == "card_time" and variables.get("PRECISION_MODE") == "fp8":
            return {"error": {"type": "out_of_memory", "message": "full"}}
        return {"pairs": []} if order["do"] == "kernels" else None

    def orders(stubs: Stubs) -> list[str]:
        return [name for name, what, _ in stubs.orders if what == "card_time"]

    with pytest.raises(KeyboardInterrupt):
        measure(trial(tmp_path, "bf16", "fp8", machine=on_card), Watched(5), none := Stubs(answer))
    assert orders(none) == []
    this = trial(tmp_path, "bf16", "fp8", machine=on_card)
    assert results(this, "again")["ways"][0]["card_time"] is None
    measure(this, Watched(), later := Stubs(answer))
    assert orders(later) == ["bf16", "fp8", "fp8"], "alone it might have had the memory"
    assert later.runs() == [] and later.most == 2
    good, bad = (way["card_time"] for way in results(this, "again")["ways"])
    assert [part["ms"] for part in good["parts"]] == [30.0, 10.0]
    assert bad == {"problem": "out_of_memory: full"}
    measure(trial(tmp_path, "bf16", "fp8", machine=on_card), Watched(), again := Stubs(answer))
    assert again.orders == []


def test_a_start_that_fails_before_the_card_is_watched_is_told(tmp_path: Path) -> None:
    on_card = MACHINE | {"card": CARD}
    with pytest.raises(KeyboardInterrupt):
        measure(trial(tmp_path, "bf16", machine=on_card), Watched(5), Stubs())
    this = trial(tmp_path, "bf16", machine=on_card)
    assert not results(this, "again")["complete"]

    def refuse(variables: Mapping[str, str], order: Mapping[str, Any]) -> dict[str, Any] | None:
        return {"error": {"type": "does_not_fit", "message": "full"}}

    measure(this, Watched(), Stubs(refuse))
    [way] = results(this, "again")["ways"]
    assert way["error"] == {"type": "does_not_fit", "message": "full"}
    assert way["seconds"]["count"] == 5


def test_every_kernel_of_ours_is_in_a_group_of_its_own_name() -> None:
    folder = Path(fused.__file__).parent
    sources = [path.read_text() for path in (*folder.glob("*.py"), *folder.glob("*.cu"))]
    triton = {name for text in sources for name in re.findall(r"def (_\w+_kernel)\(", text)}
    cuda = {name for text in sources for name in re.findall(r"__global__[^;{]*?\n(\w+)\(", text)}
    assert len(triton) > 10 and cuda == {"attend", "to_tiles"}
    ours = [re.compile(pattern) for _, pattern in card_time.GROUPS if pattern.startswith("^_")]
    ours += [re.compile(r"^attend\b"), re.compile(r"^(_to_joint_kernel|to_tiles)\b")]
    for name in triton | cuda:
        assert any(pattern.search(name) for pattern in ours), name


def test_kernels_are_told_apart_by_their_names() -> None:
    kernels = [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", 900.0, 3),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", 500.0, 1),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", 250.0, 1),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", 100.0, 7),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", 50.0, 2),
        ("Memcpy HtoD (Pinned -> Device)", 25.0, 1),
        ("_q4_q5_kernel", 10.0, 4),
        ("void at::native::convertTypes<float>", 25.0, 1),
        ("cudaLaunchKernel", 0.0, 90),
    ]
    found = {part["name"]: (part["ms"], part["count"]) for part in card_time.parts_of(kernels)}
    assert found == {
        "products": (0.9, 3),
        "attention": (0.75, 2),
        "others": (0.125, 8),
        "convolutions": (0.05, 2),
        "copies": (0.025, 1),
        "decoding of weights": (0.01, 4),
    }
    assert list(found) == [name for name in card_time.NAMES if name in found]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
def test_each_kernel_and_its_reference_take_the_same() -> None:
    device = torch.device("cpu")
    assert "problem" in measure_kernels(SHAPE, device, 1)
    small = SHAPE | {"image_tokens": 8, "text_tokens": 4}
    made = pairs(fused, small, device, torch.float32)
    assert len({name for name, _, _ in made}) == len(made)
    for name, fast, plain in made:
        if name.startswith("product"):  # of a card alone
            assert plain().shape == (12, 192)
            continue
        one, other = fast(), plain()
        one, other = ((x if isinstance(x, tuple) else (x,)) for x in (one, other))
        for found, expected in zip(one, other, strict=True):
            if isinstance(expected, reference.Quantised):
                found, expected = found.scales, expected.scales
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_process_answers_with_its_error_and_ends(tmp_path: Path) -> None:
    with Process({"PRECISION_MODE": "3bit"}, tmp_path / "logs" / "a.log") as process:
        with pytest.raises(WayFailed, match="PRECISION_MODE='3bit' is not valid") as refused:
            process.ask(do="start", begun=process.begun, loras=[])
        assert refused.value.type == "invalid_settings"
        with pytest.raises(WayFailed, match="was not started") as early:
            process.ask(do="edit", input={}, picture=None)
        assert early.value.type == "internal_error"
        process._process.kill()
        with pytest.raises(WayFailed, match="exit status -9, killed") as ended:
            process.ask(do="edit", input={}, picture=None)
        assert ended.value.type == "process_ended"
    assert process._process.poll() == -9
    with Process({}, tmp_path / "logs" / "b.log") as other:
        pass
    assert other._process.poll() is not None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--runs", "3"], "error: invalid_settings: --runs 3: at least 5"),
        (["--ways", "3bit"], "'3bit' is no way"),
    ],
)
def test_what_cannot_be_done_is_exit_status_2(
    options: list[str], told: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "comparison"
    monkeypatch.setattr("sys.argv", ["image_worker", "compare", "--out", str(out), *options])
    assert command.main() == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["CHECKPOINT", "TEXT_ENCODER_CHECKPOINT", "SVDQ_RANGES"])
def test_figures_of_another_file_of_that_name_are_not_taken(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    [way] = parse([f"a:{name}={file},PRECISION_MODE=svdq"])
    before = _identity(way)
    file.write_bytes(b"22")
    assert _identity(way) != before

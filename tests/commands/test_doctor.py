"""What the doctor says of machines, most of them made up."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from image_worker import __main__ as command
from image_worker.catalog import CATALOG, ModelEntry
from image_worker.commands import doctor, machine, packages, places
from image_worker.commands import forecast as forecasts
from image_worker.commands.facts import (
    Card,
    Driver,
    Facts,
    Finding,
    Forecast,
    Package,
    Places,
    PreparedFolder,
    Process,
    Torch,
)
from image_worker.commands.findings import findings, served
from image_worker.commands.forecast import MEASURED, MEASURED_ON, forecast
from image_worker.model.full_sizes import FullSize, full_size
from image_worker.settings import Settings

GIB = 2**30
ROOT = Path(__file__).parents[2]
SMALL = ("NVIDIA GeForce RTX 3080", (8, 6), 10.0)
MIDDLE = ("NVIDIA GeForce RTX 4090", (8, 9), 24.0)
LARGE = ("NVIDIA H200", (9, 0), 140.0)
OLD = ("Tesla T4", (7, 5), 15.0)
_Kind = tuple[str, tuple[int, int], float]


@functools.cache
def _full_size(name: str, quantised: str) -> FullSize:
    return full_size(CATALOG[name], Settings.from_env({"QUANTIZE_COMPONENTS": quantised}))


@pytest.fixture(autouse=True)
def _sizes_are_computed_once(monkeypatch: Any) -> None:
    def known(entry: ModelEntry, settings: Settings) -> FullSize:
        return _full_size(entry.name, settings.quantize_components)

    monkeypatch.setattr(forecasts, "full_size", known)


def card(kind: _Kind, free: float | None = None) -> Card:
    name, capability, total = kind
    left = total - 0.5 if free is None else free
    return Card(name, capability, int(total * GIB), int(left * GIB), "580.82.07")


def facts(kind: _Kind | None = None, *, host: float = 64.0, **variables: str) -> Facts:
    """A machine that is well set up."""
    found = None if kind is None else card(kind)
    driver = Driver(problem="there is no nvidia-smi")
    if found is not None:
        driver = Driver((found,), cuda=(13, 0))
    return Facts(
        settings=Settings.from_env(variables),
        settings_problem=None,
        driver=driver,
        torch=Torch("2.13.0", "13.0", dataclasses.replace(found, driver=None) if found else None),
        places=Places("/models", free=100 * 10**9),
        host=int(host * GIB),
        packages=(Package("torch", "==2.13.0", "2.13.0", True),),
    )


def judge(given: Facts) -> tuple[list[Finding], Forecast]:
    entry = served(given)
    assert given.settings is not None and entry is not None
    seen = forecast(given.settings, entry, given.card, given.host)
    return findings(given, seen), seen


def problems(found: list[Finding]) -> list[str]:
    return [one.text for one in found if one.status == "problem"]


def about(found: list[Finding], topic: str) -> str:
    return "\n".join(f"{one.status} {one.text}" for one in found if one.topic == topic)


@pytest.mark.parametrize(
    ("kind", "fits", "products", "chosen"),
    [
        (SMALL, ["blocks pass"] * 5, ["bf16", "bf16", "LLM.int8()", "bf16", "bf16"], "4bit"),
        (
            MIDDLE,
            ["blocks pass", *["all stay"] * 4],
            ["bf16", "fp8", "LLM.int8()", "fp8", "fp8"],
            "4bit",
        ),
        (LARGE, ["all stay"] * 5, ["bf16", "fp8", "LLM.int8()", "fp8", "fp8"], "bf16"),
        (
            OLD,
            [*["blocks pass"] * 3, "all stay", "all stay"],
            ["fp16", "fp16", "LLM.int8()", "fp16", "fp16"],
            "4bit",
        ),
    ],
)
def test_what_fits_on_which_card(
    kind: _Kind, fits: list[str], products: list[str], chosen: str
) -> None:
    given = facts(kind)
    found, seen = judge(given)
    assert not problems(found)
    assert [row.precision for row in seen.rows] == ["bf16", "fp8", "8bit", "svdq", "4bit"]
    assert [row.places for row in seen.rows] == fits
    assert [row.products for row in seen.rows] == products
    assert seen.chosen is not None and seen.chosen.precision == chosen
    assert given.card is not None and given.card.free is not None
    assert all(row.peak is not None and row.peak <= given.card.free for row in seen.rows)
    assert f"edit-2509 in {chosen}" in about(found, "model")
    assert kind[0] in about(found, "card") and "580.82.07, CUDA up to 13.0" in about(
        found, "driver"
    )
    text = doctor.as_text(found, seen)
    assert all(re.search(rf"^  {row.precision} +{row.places}", text, re.M) for row in seen.rows)
    assert text.endswith("a worker would start")


def test_speeds_are_those_of_the_readme_and_of_the_card_that_was_measured() -> None:
    table = (ROOT / "README.md").read_text().split("A whole job of 4 steps", 1)[1]
    for precision, seconds in MEASURED.items():
        cells = re.search(rf"^\| `{precision}` \|.*\| ([\d.]+) \|$", table, re.M)
        assert cells and round(float(cells[1]), 2) == seconds
    _, seen = judge(facts(LARGE))
    quoted = {row.precision: row.speed for row in seen.rows}
    assert quoted["4bit"] == f"0.92 s a job on an {MEASURED_ON}"
    assert quoted["bf16"] == quoted["8bit"] == "not measured on this card"
    for kind in (SMALL, MIDDLE, OLD):
        assert {row.speed for row in judge(facts(kind))[1].rows} == {"not measured on this card"}
    _, limited = judge(facts(LARGE, GPU_MAX_GIB="6"))
    assert {row.speed for row in limited.rows} == {"not measured on this card"}


def test_the_readmes_table_is_the_code() -> None:
    readme = (ROOT / "README.md").read_text()
    text = doctor.as_text(*judge(facts(MIDDLE)))
    for line in text.split("edit-2509 on this card:\n", 1)[1].splitlines()[:5]:
        assert f"    {line}\n" in readme


def test_without_a_card_the_miniature_is_served() -> None:
    found, seen = judge(facts())
    assert not problems(found) and not seen.rows
    assert "the miniature is served, on the CPU" in about(found, "model")
    assert about(found, "card") == "note there is none (there is no nvidia-smi)"
    assert not about(found, "model files"), "nothing is downloaded for it"


def test_the_full_model_without_a_card_takes_the_hosts_memory() -> None:
    found, _ = judge(facts(MODEL="edit-2509"))
    assert "on the CPU: weights take 39.9 GiB" in about(found, "model") and not problems(found)
    found, _ = judge(facts(MODEL="edit-2509", host=30.0))
    assert "39.9 GiB" in problems(found)[0]


def test_numbers_of_an_old_card() -> None:
    said = about(judge(facts(OLD))[0], "numbers")
    assert "no bf16" in said and "no products in FP8" in said
    assert about(judge(facts(MIDDLE))[0], "numbers") == "ok bf16\nok products in FP8"
    older = ("Tesla V100", (7, 0), 32.0)
    assert any("torch needs 7.5" in text for text in problems(judge(facts(older))[0]))


@pytest.mark.parametrize(
    ("kind", "variables", "message"),
    [
        (MIDDLE, {"CPU_OFFLOAD": "none", "PRECISION_MODE": "bf16"}, "does not fit"),
        (SMALL, {"GPU_MAX_GIB": "1"}, "does not fit: 1.0 GiB are free"),
        (SMALL, {"COMPUTE": "fp8"}, "COMPUTE=fp8 is impossible with 4bit"),
        (MIDDLE, {"ATTENTION": "int8"}, "takes bfloat16 and a Hopper card"),
    ],
)
def test_settings_that_this_card_cannot_honour(
    kind: _Kind, variables: dict[str, str], message: str
) -> None:
    found, seen = judge(facts(kind, **variables))
    assert any(message in text for text in problems(found))
    assert len(seen.rows) == 5
    assert doctor.as_text(found, seen).endswith("1 to be solved before a start")


def test_a_precision_that_does_not_fit_is_a_no_in_the_table() -> None:
    _, seen = judge(facts(OLD, CPU_OFFLOAD="none"))
    assert [row.places for row in seen.rows] == ["no", "no", "no", "all stay", "all stay"]
    assert seen.rows[0].peak is None and "does not fit" in seen.rows[0].why


def test_the_older_name_for_offloading_is_understood() -> None:
    _, seen = judge(facts(LARGE, INT8_CPU_OFFLOAD="1"))
    assert seen.chosen is not None and seen.chosen.precision == "8bit"
    assert [row.places for row in seen.rows] == ["blocks pass"] * 5


def test_a_host_without_room_for_what_passes() -> None:
    given = facts(SMALL, host=5.0, GPU_MAX_GIB="6")
    found, seen = judge(given)
    assert seen.from_disk and seen.rows[-1].places == "blocks pass, from disk"
    assert "prepare them on a machine with more memory" in problems(found)[0]
    assert given.places is not None
    there = (PreparedFolder("x", "edit-2509", "4bit", 13 * 10**9),)
    prepared = dataclasses.replace(given.places, prepared=there)
    found, _ = judge(dataclasses.replace(given, places=prepared))
    assert not problems(found) and "x (edit-2509, 4bit): 13.00 GB" in about(
        found, "prepared weights"
    )


def test_memory_that_others_have_is_named() -> None:
    given = facts(MIDDLE)
    driver = dataclasses.replace(
        given.driver, processes=(Process(7, "python", 9 * GIB), Process(8, "x", None))
    )
    busy = dataclasses.replace(given.torch, card=card(MIDDLE, free=10.0))
    found, seen = judge(dataclasses.replace(given, driver=driver, torch=busy))
    said = about(found, "card memory")
    assert "10.0 GiB of 24.0 GiB are free" in said and "process 7 (python) has 9.0 GiB" in said
    assert seen.rows[-1].places == "blocks pass"


@pytest.mark.parametrize(
    ("torch", "cuda", "message"),
    [
        (Torch(None, problem="No module named 'torch'"), (13, 0), "cannot be imported: No module"),
        (Torch("2.13.0+cpu"), (13, 0), "built without CUDA, so the card is not used"),
        (Torch("2.13.0", "13.0"), (12, 4), "the driver runs 12.4 at most"),
        (Torch("2.13.0", "13.0", problem="CUDA is ill"), (13, 0), "sees no card: CUDA is ill"),
        (Torch("2.13.0", "13.0"), None, "CUDA_VISIBLE_DEVICES may hide it"),
    ],
)
def test_a_card_that_torch_cannot_use(
    torch: Torch, cuda: tuple[int, int] | None, message: str
) -> None:
    given = facts(MIDDLE)
    driver = dataclasses.replace(given.driver, cuda=cuda)
    found = findings(dataclasses.replace(given, torch=torch, driver=driver), None)
    assert any(message in text for text in problems(found))


def test_several_cards() -> None:
    given = facts(MIDDLE)
    both = dataclasses.replace(given.driver, cards=(card(MIDDLE), card(LARGE)))
    assert "there are 2; a worker uses the first" in about(
        judge(dataclasses.replace(given, driver=both))[0], "card"
    )


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"free": 100 * 10**9}, "note", "58.5 GB are to be downloaded"),
        ({"free": 50 * 10**9}, "problem", "58.5 GB are to be downloaded"),
        ({"partial": 30 * 10**9}, "note", "28.5 GB are to be downloaded (30.0 GB are there)"),
        ({"has_model": True}, "note", "0.8 GB are to be downloaded"),
        ({"has_model": True, "has_adapter": True}, "ok", "are all there"),
        ({"writable": False}, "problem", "58.5 GB are to be downloaded"),
        ({"problem": "MODEL_DIR is itself a model folder"}, "problem", "is itself a model folder"),
    ],
)
def test_what_is_to_be_downloaded(change: dict[str, Any], status: str, message: str) -> None:
    given = facts(MIDDLE)
    assert given.places is not None
    there = dataclasses.replace(given.places, **change)
    found, _ = judge(dataclasses.replace(given, places=there))
    assert f"{status} " in about(found, "model files") and message in about(found, "model files")


def test_a_disk_without_room_for_prepared_weights_is_no_problem() -> None:
    given = facts(MIDDLE)
    tight = dataclasses.replace(given, places=Places("/models", free=60 * 10**9))
    found, _ = judge(tight)
    assert not problems(found) and "note 13.0 GB more" in about(found, "disk")


def test_what_is_not_here_and_may_not_be_downloaded() -> None:
    found, _ = judge(facts(MIDDLE, LOCAL_ONLY="1"))
    assert problems(found) == ["LOCAL_ONLY=1, and not on this machine: model and Lightning LoRA"]


def test_whole_prepared_weights_may_stand_for_the_checkpoint() -> None:
    given = facts(MIDDLE, LOCAL_ONLY="1")
    assert given.places is not None
    for name, precision, is_enough in (
        ("a-whole", "4bit", True),
        ("a", "4bit", False),
        ("a-whole", "bf16", False),
    ):
        folder = PreparedFolder(name, "edit-2509", precision, 1)
        there = dataclasses.replace(given.places, prepared=(folder,))
        found, _ = judge(dataclasses.replace(given, places=there))
        assert bool(problems(found)) != is_enough
    _, seen = judge(facts(MIDDLE, KEEP_PREPARED="whole"))
    assert 26e9 < seen.prepared["4bit"] < 27e9


def test_without_torch_a_checkpoint_is_not_looked_into() -> None:
    found, _ = judge(facts(MIDDLE, CHECKPOINT="me/mine:one.safetensors"))
    assert "CHECKPOINT is not looked into without torch" in about(found, "checkpoint")


def test_a_volume_beside_model_dir() -> None:
    given = facts(MIDDLE)
    assert given.places is not None
    there = dataclasses.replace(given.places, volume=True)
    found, _ = judge(dataclasses.replace(given, places=there))
    assert "MODEL_DIR is not on it" in about(found, "network volume")


def test_wrong_settings_are_shown_and_the_rest_is_judged_all_the_same() -> None:
    given = dataclasses.replace(facts(MIDDLE), settings=None, settings_problem="A='1'\nB='2'")
    found = findings(given, None)
    assert problems(found) == ["A='1'", "B='2'"]
    assert about(found, "card") and about(found, "host memory")


def test_packages_that_are_missing_or_of_another_version() -> None:
    wanted = [
        "torch==2.13.0",
        "peft==0.21.2",
        "numpy==2.4.6",
        'cuda-bindings<14,>=13; extra == "x"',
    ]
    there = {"torch": "2.11.0", "numpy": "2.4.6"}
    compared = packages.compare([*wanted, 'none==1; sys_platform == "win32"'], there.get)
    assert [one.name for one in compared if not one.fits] == ["torch", "peft"]
    found = findings(dataclasses.replace(facts(), packages=tuple(compared)), None)
    assert "note torch is 2.11.0; the project asks for ==2.13.0" in about(found, "packages")
    assert "note peft is not there" in about(found, "packages"), "a start does not import it"
    missing = (Package("pillow", "==13.0.0", None, False),)
    assert problems(findings(dataclasses.replace(facts(), packages=missing), None)) == [
        "pillow is not there; the project asks for ==13.0.0"
    ]


@pytest.mark.parametrize(
    ("found", "clauses", "fits"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13", "==2.13.0", True),
        ("13.5.0", "<14,>=13", True),
        ("14.0.0", "<14,>=13", False),
        ("12.9", "<14,>=13", False),
        ("2.9.0", ">=2.10", False),
        ("1", "", True),
    ],
)
def test_versions(found: str, clauses: str, fits: bool) -> None:
    assert packages.meets(found, clauses) == fits


def test_a_package_of_the_same_name_is_recognised(monkeypatch: Any) -> None:
    def of(*names: str) -> Any:
        files = [Path(name) for name in names]
        return lambda name: SimpleNamespace(version="0.16.1", files=files)

    monkeypatch.setattr(packages, "distribution", of("nunchaku/__init__.py", "nunchaku/sampler.py"))
    strangers = packages.look_for_strangers()
    assert strangers == {"nunchaku": "0.16.1"}
    found = findings(dataclasses.replace(facts(), strangers=strangers), None)
    assert "nunchaku 0.16.1 has no nunchaku.models: it is a statistics" in about(found, "packages")
    monkeypatch.setattr(packages, "distribution", of("nunchaku/models/__init__.py"))
    assert not packages.look_for_strangers()


def test_the_tools_lines_are_read() -> None:
    line = "NVIDIA H200, 9.0, 580.82.07, 143771, 143166"
    assert machine.card(line) == Card(
        "NVIDIA H200", (9, 0), 143771 * 2**20, 143166 * 2**20, "580.82.07"
    )
    odd = machine.card("Card, with comma, [N/A], 580, [N/A], [Not Supported]")
    assert odd == Card("Card, with comma", None, None, None, "580")
    assert machine.process("12, /usr/bin/a, b, 512") == Process(12, "/usr/bin/a, b", 512 * 2**20)
    assert machine.process("12, x, [N/A]").used is None
    for wrong in ("", "one, two", "x, name, 1"):
        with pytest.raises(ValueError):
            machine.card(wrong) if wrong != "x, name, 1" else machine.process(wrong)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (FileNotFoundError(), "there is no nvidia-smi"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (subprocess.TimeoutExpired("nvidia-smi", 30), "timed out"),
        ((9, "NVIDIA-SMI has failed\nmore"), "does not answer: NVIDIA-SMI has failed"),
        ((0, "no table"), "does not answer"),
    ],
)
def test_a_tool_that_fails_is_said(answer: Any, message: str, monkeypatch: Any) -> None:
    def run(*_: Any, **__: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return SimpleNamespace(returncode=answer[0], stdout=answer[1], stderr="")

    monkeypatch.setattr(machine.subprocess, "run", run)
    found = machine.look_at_driver()
    assert found.problem and message in found.problem and not found.cards
    assert machine.MIB == 2**20


def test_places_are_looked_at(tmp_path: Path, monkeypatch: Any) -> None:
    settings = Settings.from_env({"MODEL_DIR": str(tmp_path / "models"), "MODEL": "edit-2509"})
    entry = served(dataclasses.replace(facts(), settings=settings))
    assert entry is not None
    empty = places.look_at_places(settings, entry, volume=tmp_path / "volume")
    assert empty.free and empty.writable and not (empty.has_model or empty.volume)
    assert not (tmp_path / "models").exists(), "looking makes nothing"
    blobs = tmp_path / "models" / "models--Qwen--Qwen-Image-Edit-2509" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a.incomplete").write_bytes(b"x" * 100)
    folder = tmp_path / "models" / "prepared" / "edit-2509-4bit-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"made_of": {"model": "m", "precision": "4bit"}}')
    found = places.look_at_places(settings, entry, volume=tmp_path)
    assert found.partial == 100 and found.volume and found.in_volume
    assert [(one.model, one.precision) for one in found.prepared] == [("m", "4bit")]
    assert not found.downloads
    kept = tmp_path / "models" / "loras" / f"{'0' * 32}.safetensors"
    for path in (kept, tmp_path / "models" / "checkpoints" / ("0" * 16) / "x.gguf"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 1000)
    found = places.look_at_places(settings, entry, volume=tmp_path)
    said = about(
        findings(dataclasses.replace(facts(), settings=settings, places=found), None), "downloads"
    )
    assert "for LoRAs of jobs: 1 files, 1.00 kB (python -m image_worker clean --loras)" in said
    assert (
        "for CHECKPOINT or TEXT_ENCODER_CHECKPOINT: 1 files" in said
        and "clean --checkpoints" in said
    )
    (tmp_path / "models" / "model_index.json").touch()
    assert "itself a model folder" in (places.look_at_places(settings, entry).problem or "")


def test_here_and_as_json(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("sys.argv", ["image_worker", "doctor", "--json"])
    status = command.main()
    text = capsys.readouterr().out
    said = json.loads(text)
    assert said["starts"] == (status == 0)
    topics = {one["topic"] for one in said["findings"]}
    assert {"settings", "torch", "card", "model", "disk", "host memory", "hub token"} <= topics
    assert "hf_secret" not in text
    monkeypatch.setenv("PRECISION_MODE", "3bit")
    monkeypatch.setattr("sys.argv", ["image_worker", "doctor"])
    assert command.main() == 1
    assert "problem  settings: PRECISION_MODE='3bit' is not valid" in capsys.readouterr().out


QUIET = """
import sys
from image_worker import __main__
sys.argv = ["image_worker", *{arguments}]
try:
    __main__.main()
except SystemExit:
    pass
sys.exit("torch" in sys.modules)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["clean"]])
def test_what_needs_no_torch_does_not_import_it(arguments: list[str], tmp_path: Path) -> None:
    program = [sys.executable, "-c", QUIET.format(arguments=arguments)]
    env = os.environ | {"MODEL_DIR": str(tmp_path), "CHECKPOINT": "me/mine:x"}
    done = subprocess.run(program, capture_output=True, check=False, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr.decode()


def test_a_missing_package_is_named_where_nothing_else_can_be_said(
    monkeypatch: Any, capsys: Any
) -> None:
    def look() -> None:
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr(doctor, "look", look)
    monkeypatch.setattr(doctor, "look_at_packages", lambda: ((), None))
    monkeypatch.setattr("sys.argv", ["image_worker", "doctor"])
    assert command.main() == 1
    assert "packages are missing: pydantic" in capsys.readouterr().err

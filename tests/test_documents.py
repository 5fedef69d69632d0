"""What the documents and deployment files say is compared with the code."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from image_worker import __main__ as command
from image_worker.allowed import allowed_values
from image_worker.catalog import CATALOG
from image_worker.job.request import EditRequest
from image_worker.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = sorted((ROOT / "src" / "image_worker").rglob("*.py"))
HIDDEN = {"runpod_webhook_get_job"}  # set by RunPod, not by users


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of the README."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table
    lines = table[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def default(name: str) -> str:
    field = Settings.model_fields[name]
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{int(value)}`"
    return f"`{value}`".replace(str(Path.home()), "~")


def test_the_settings_table_is_the_code() -> None:
    table = {cells[0].strip("`"): cells[1:] for cells in rows("Settings")}
    fields = {name for name in Settings.model_fields if name not in HIDDEN}
    assert list(table) == [name.upper() for name in Settings.model_fields if name in fields]
    for name in fields:
        cell, meaning = table[name.upper()]
        assert cell == default(name), name
        for choice in get_args(Settings.model_fields[name].annotation):
            if isinstance(choice, str):
                assert f"`{choice}`" in meaning, f"{name}: {choice} is not explained"


def test_every_setting_says_what_it_is_and_allows() -> None:
    for field in Settings.model_fields.values():
        assert field.description
        assert allowed_values(field)


def test_the_request_table_is_the_code() -> None:
    named = {name for cells in rows("Request") for name in re.findall(r"`(\w+)`", cells[0])}
    assert named == set(EditRequest.model_fields)


def test_the_response_example_is_json_with_the_real_fields() -> None:
    section = README.split("## Response\n", 1)[1]
    example = json.loads(section.strip().split("\n\n", 1)[0])
    from image_worker.worker import Worker
    from tests.worker_jobs import job

    reply = Worker.from_settings(Settings.from_env({"MODEL": "mini"})).run_blocking(job())
    assert set(example) | {"cold_start"} == set(reply)
    assert set(example["timings"]) == set(reply["timings"])


@pytest.mark.parametrize("name", ["edit", "doctor", "calibrate", "clean"])
def test_the_command_line_is_the_code(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README.split("## Command line\n", 1)[1].split("\n## ", 1)[0]
    monkeypatch.setattr("sys.argv", ["image_worker", name, "--help"])
    with pytest.raises(SystemExit):
        command.main()
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert f"python -m image_worker {name}" in section
    for option in options:
        assert option in section, option


def test_the_tree_names_every_module() -> None:
    tree = README.split("## How it is built", 1)[1]
    for path in SOURCES:
        if path.name == "__init__.py" or "bench" in path.parts or "serve" in path.parts:
            continue
        parent = path.parent.name
        name = path.name if parent != "formats" else f"{path.stem}"
        assert name in tree, path


def test_the_hub_form_is_the_code() -> None:
    hub = json.loads((ROOT / ".runpod" / "hub.json").read_text())
    assert hub["type"] == "serverless"
    for variable in hub["config"]["env"]:
        key, form = variable["key"], variable["input"]
        field = Settings.model_fields[key.lower()]
        values = [option["value"] for option in form.get("options", [])] + [form["default"]]
        for value in values:
            text = str(int(value)) if isinstance(value, bool) else value
            Settings.from_env({key: text})
        if key not in ("MODEL", "MODEL_DIR"):  # the container has defaults of its own for these
            preset = field.get_default()
            assert form["default"] == (preset if isinstance(preset, bool) else str(preset)), key
    models = next(v for v in hub["config"]["env"] if v["key"] == "MODEL")["input"]["options"]
    assert {option["value"] for option in models} == set(CATALOG)
    for preset in hub["config"]["presets"]:
        Settings.from_env(preset["defaults"])


def test_the_hub_tests_are_jobs_that_are_accepted() -> None:
    tests = json.loads((ROOT / ".runpod" / "tests.json").read_text())
    env = {variable["key"]: variable["value"] for variable in tests["config"]["env"]}
    settings = Settings.from_env(env)
    for test in tests["tests"]:
        assert EditRequest.parse(test["input"], CATALOG[settings.model]).sources
    assert EditRequest.parse(
        json.loads((ROOT / "test_input.json").read_text())["input"], CATALOG["mini"]
    ).sources


def test_the_container_sets_only_settings_and_pythons_own() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    blocks = re.findall(r"^ENV ((?:.*\\\n)*.*)", dockerfile, re.MULTILINE)
    env = dict(re.findall(r"(\w+)=(\S+)", " ".join(blocks)))
    ours = {name: value for name, value in env.items() if name.lower() in Settings.model_fields}
    assert {"MODEL", "MODEL_DIR", "API_HOST"} == set(ours)
    settings = Settings.from_env(ours)
    assert settings.model == "edit-2509"
    table = {cells[0].strip("`"): cells[2] for cells in rows("Settings")}
    for name, value in ours.items():
        assert f"`{value}`" in table[name], f"the README does not say the container's {name}"
    others = set(env) - set(ours)
    assert others <= {
        "PATH",
        "HOME",
        "PYTHONUNBUFFERED",
        "PIP_NO_CACHE_DIR",
        "PIP_DISABLE_PIP_VERSION_CHECK",
        "MALLOC_MMAP_THRESHOLD_",
        "PYTORCH_CUDA_ALLOC_CONF",
    }


def test_the_base_image_the_hub_and_the_readme_agree_on_cuda() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    base = re.search(r"^FROM nvidia/cuda:(\d+\.\d+)\.\d+-base", dockerfile, re.MULTILINE)
    assert base
    hub = json.loads((ROOT / ".runpod" / "hub.json").read_text())
    assert base[1] in hub["config"]["allowedCudaVersions"]
    assert f"CUDA {base[1]}" in README and "R580" in README


def test_every_requirement_is_pinned() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        exact = re.fullmatch(r"[\w-]+==[\w.]+(; sys_platform == \"linux\")?", line)
        # torch's CUDA build has a say in this one; its CPU build has not.
        assert line.startswith(("#", "cuda-bindings>=13,<14;")) or exact, line


def test_the_package_holds_every_file_that_it_reads() -> None:
    """The image installs the package, and has no sources beside it."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "src" / "image_worker"
    held = {
        path
        for pattern in options["package-data"]["image_worker"]
        for path in package.glob(pattern)
    }
    others = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    }
    assert others and others <= held, others - held


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FORBIDDEN = {
    "job": ("torch", "diffusers", "transformers", "image_worker.edit", "image_worker.model"),
    "serve": ("torch", "diffusers", "transformers", "image_worker.edit", "image_worker.model"),
    "edit": ("image_worker.job", "image_worker.serve", "image_worker.worker", "runpod"),
    "model": ("image_worker.job", "image_worker.serve", "image_worker.edit", "image_worker.worker"),
}
FORBIDDEN = {room: (*names, "image_worker.commands") for room, names in FORBIDDEN.items()}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room: str) -> None:
    for path in SOURCES:
        if room not in path.parts:
            continue
        for name in imports(path):
            top = (name, name.split(".")[0])
            assert not any(name == f or name.startswith(f + ".") for f in FORBIDDEN[room]), (
                path,
                top,
            )


def test_only_settings_reads_the_environment() -> None:
    for path in SOURCES:
        if path.name == "settings.py":
            continue
        assert not re.search(r"os\.(environ(?!\.setdefault)|getenv)", path.read_text()), path

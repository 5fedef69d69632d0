"""What `CHECKPOINT` may name, and what is known of published files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from image_worker.catalog import CATALOG, HubFile
from image_worker.checkpoints import PUBLISHED, REFUSED, Published, lightning_of, model_of, parse
from image_worker.errors import InvalidSettings
from image_worker.job import loras
from image_worker.settings import Settings

FP8 = (
    "lightx2v/Qwen-Image-Edit-2511-Lightning:"
    "qwen_image_edit_2511_fp8_e4m3fn_scaled_lightning.safetensors"
)
TEXT = (
    "Comfy-Org/Qwen-Image_ComfyUI:split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"
)
GGUF = "QuantStack/Qwen-Image-Edit-2509-GGUF:Qwen-Image-Edit-2509-Q4_K_M.gguf"


def settings(**variables: str) -> Settings:
    return Settings.from_env({name.upper(): value for name, value in variables.items()})


def test_places(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.touch()
    assert parse(str(path)) == path
    assert parse("https://host/file.gguf?key=1") == "https://host/file.gguf?key=1"
    assert parse("me/mine:folder/file.gguf") == HubFile("me/mine", "folder/file.gguf", "main")
    assert parse("me/mine:file.gguf@v2") == HubFile("me/mine", "file.gguf", "v2")


@pytest.mark.parametrize(
    "text",
    ["http://host/file.gguf", "nothing.gguf", "/not/there.gguf", "me/mine", "a/b/c:d", "/a:b"],
)
def test_what_names_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidSettings, match="is no file of this machine, no https URL"):
        parse(text)


def test_published_files_are_of_models_that_are_known() -> None:
    assert len(PUBLISHED) == 20 and len(REFUSED) == 10
    places = [(known.repo, known.path) for known in (*PUBLISHED, *REFUSED)]
    assert len(set(places)) == len(places)
    for known in (*PUBLISHED, *REFUSED):
        assert known.lightning_steps in (0, *CATALOG[known.model].lightning)
        told = re.search(r"(\d)steps", known.path)
        assert told is None or int(told[1]) == known.lightning_steps
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", known.repo)
        assert known.path.endswith((".safetensors", ".gguf"))
        # Names say which model they are of, all but Lightning's own repo.
        assert known.model.removeprefix("edit-") in known.path


def expanded(text: str) -> list[str]:
    """`a{1,2}` as a1 and a2."""
    found = re.search(r"\{([^}]*)\}", text)
    if found is None:
        return [text]
    parts = (text[: found.start()] + part + text[found.end() :] for part in found[1].split(","))
    return [path for part in parts for path in expanded(part)]


def test_the_readmes_list_is_the_table() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme.split("| repo | files | `MODEL` | Lightning |\n| --- | --- | --- | --- |\n")[1]
    found, repo = [], ""
    for line in table.split("\n\n")[0].splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        repo = cells[0] or repo
        for path in expanded(cells[1]):
            found.append((repo, path, cells[2], int(cells[3] or 0)))
    known = [(one.repo, one.path, one.model, one.lightning_steps) for one in PUBLISHED]
    assert sorted(found) == sorted(known)


def test_what_is_in_fp4_is_refused_before_it_is_downloaded() -> None:
    for known in REFUSED:
        with pytest.raises(
            InvalidSettings, match=r"nunchaku's fp4, .* the one in int4: "
        ) as caught:
            model_of(settings(checkpoint=f"{known.repo}:{known.path}"))
        instead = str(caught.value).rpartition("the one in int4: ")[2]
        assert model_of(settings(checkpoint=instead)) == known.model
        assert lightning_of(settings(checkpoint=instead)) == known.lightning_steps


@pytest.mark.parametrize("known", [PUBLISHED[0], REFUSED[0], PUBLISHED[10]])
def test_a_job_that_names_a_transformer_is_told_so(known: Published) -> None:
    with pytest.raises(ValueError, match="a whole transformer, which no job chooses"):
        loras.parse(f"{known.repo}:{known.path}")


def test_what_is_known_decides_the_model_and_its_steps() -> None:
    assert model_of(settings(checkpoint=FP8)) == "edit-2511"
    assert model_of(settings(checkpoint=FP8, model="edit-2511")) == "edit-2511"
    assert model_of(settings(model="edit")) == "edit"
    assert model_of(settings(checkpoint="me/mine:x.gguf")) == "auto"
    assert lightning_of(settings(checkpoint=FP8)) == 4
    assert lightning_of(settings(checkpoint=GGUF)) == 0
    assert lightning_of(settings(checkpoint=GGUF, checkpoint_lightning="8")) == 8
    assert lightning_of(settings(checkpoint=FP8, checkpoint_lightning="0")) == 0
    assert lightning_of(settings()) == 0


def test_another_model_than_the_files_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="belongs to edit-2511; set MODEL=edit-2511"):
        model_of(settings(checkpoint=FP8, model="edit-2509"))


def test_a_text_encoder_is_of_all_full_size_models() -> None:
    for model in ("auto", "edit-2509", "edit-2511", "image"):
        assert model_of(settings(text_encoder_checkpoint=TEXT, model=model)) == model
    assert model_of(settings(text_encoder_checkpoint=TEXT, checkpoint=FP8)) == "edit-2511"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"text_encoder_checkpoint": TEXT, "model": "mini"}, "belongs to the full-size models"),
        ({"text_encoder_checkpoint": FP8}, "is a transformer; name it in CHECKPOINT"),
        ({"checkpoint": TEXT}, "is a text encoder; name it in TEXT_ENCODER_CHECKPOINT"),
        ({"text_encoder_checkpoint": "x.bin"}, "TEXT_ENCODER_CHECKPOINT='x.bin' is no file of"),
    ],
)
def test_a_wrong_text_encoder_is_refused_before_any_download(
    variables: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidSettings, match=message):
        model_of(settings(**variables))

"""`LORA_SOURCES`: what jobs may name, and for which repos the operator's token is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from image_worker import lora_files
from image_worker.errors import InvalidLora, InvalidSettings
from image_worker.job.request import LoraOption
from image_worker.lora_files import LoraFiles
from image_worker.lora_sources import LoraSources
from image_worker.loras import Loras
from image_worker.settings import Settings
from tests.conftest import MINI_FOLDER, mini_model
from tests.model.fake_hub import REPO, Hub, only

NAME = "style.safetensors"
STYLE = MINI_FOLDER / "loras" / "miniature-outlined-style-bf16.safetensors"
ON_HUB = f"{REPO}:{NAME}"


def loras(folder: Path, **env: str) -> Loras:
    return Loras(Settings.from_env({"MODEL_DIR": str(folder), **env}), mini_model())


def options(*sources: str) -> list[LoraOption]:
    return [LoraOption(source=source) for source in sources]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with only(Hub({NAME: STYLE.read_bytes()}), monkeypatch) as hub:
        yield hub


def test_by_default_all_three_kinds_may_be_named() -> None:
    found = LoraSources.parse(Settings.from_env({}).lora_sources)
    assert found.folder and found.has_repo("a/b", None) and found.has_url("https://a.example/x")
    assert not found.names("a/b")


@pytest.mark.parametrize(
    ("text", "folder", "repos", "hosts"),
    [
        ("folder", True, set(), set()),
        ("hub", False, {"me/mine", "me/other", "you/mine"}, set()),
        ("folder, me/*", True, {"me/mine", "me/other"}, set()),
        ("me/mine,a.example", False, {"me/mine"}, {"https://a.example/x"}),
        ("A.Example", False, set(), {"https://a.example/x"}),
        ("https", False, set(), {"https://a.example/x", "https://b.a.example/x"}),
    ],
)
def test_what_a_list_allows(text: str, folder: bool, repos: set[str], hosts: set[str]) -> None:
    found = LoraSources.parse(text)
    known = ("me/mine", "me/other", "you/mine", "me2/mine")
    assert found.folder == folder
    assert {repo for repo in known if found.has_repo(repo, "main")} == repos | (
        {"me2/mine"} if text == "hub" else set()
    )
    urls = ("https://a.example/x", "https://b.a.example/x")
    assert {url for url in urls if found.has_url(url)} == hosts


@pytest.mark.parametrize(
    "url",
    [
        "https://a.example.evil.net/x",
        "https://a.example@evil.net/x",
        "https://evil.net\\@a.example/x",
        "https://evil.net/a.example",
        "https://a.example:8443/x",
        "https://user@a.example/x",
        "https://xa.example/x",
        "https:///a.example",
    ],
)
def test_a_url_that_only_looks_like_an_allowed_host(url: str) -> None:
    found = LoraSources.parse("a.example")
    assert not found.has_url(url)
    assert found.has_url("https://A.example:443/x") and LoraSources.parse("https").has_url(url)


@pytest.mark.parametrize(
    "text",
    ["hub,", "*", "*/*", "*/mine", "me/mi*", "../x", "me/mine/file", "files", "a.example/", "http"],
)
def test_a_list_that_is_not_understood_stops_the_start(text: str) -> None:
    with pytest.raises(InvalidSettings, match=r"LORA_SOURCES=.* is none of folder, hub, https"):
        Settings.from_env({"LORA_SOURCES": text})


def test_a_folder_that_no_job_may_name_is_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="has no meaning with LORA_SOURCES=hub; add folder"):
        Settings.from_env({"LORA_DIR": str(tmp_path), "LORA_SOURCES": "hub"})


def test_nothing_is_fetched_for_a_job_that_names_what_is_not_allowed(
    hub: Hub, tmp_path: Path
) -> None:
    found = loras(tmp_path, LORA_SOURCES=f"folder,{REPO},a.example")
    for source in ("a/b:c.safetensors", "https://b.example/x.safetensors"):
        with pytest.raises(InvalidLora) as caught:
            found.style(options(ON_HUB, source))
        assert caught.value.field == "loras[1].source"
        assert caught.value.message.endswith(
            "but: files of its own folder, repos that its operator chose, https URLs of a.example "
            "(LORA_SOURCES)"
        )
    with pytest.raises(InvalidLora, match="nowhere but"):
        loras(tmp_path, LORA_SOURCES="hub").style(options(NAME))
    assert not hub.lists and not list(tmp_path.iterdir())


def test_the_token_is_sent_for_repos_that_are_named_alone(hub: Hub, tmp_path: Path) -> None:
    assert loras(tmp_path).style(options(ON_HUB))
    assert not hub.tokens
    assert loras(tmp_path, LORA_SOURCES=f"hub,{REPO}").style(options(ON_HUB))
    assert hub.tokens == {"Bearer hf_secret"}
    assert sorted(path.name for path in (tmp_path / lora_files.FOLDER).iterdir()) == [
        "hub",
        "hub-token",
    ]


def test_a_private_repo_is_had_while_it_is_named_and_no_longer(hub: Hub, tmp_path: Path) -> None:
    hub.private = True
    with pytest.raises(InvalidLora, match="has to be named in this worker's LORA_SOURCES"):
        loras(tmp_path).style(options(ON_HUB))
    assert loras(tmp_path, LORA_SOURCES=REPO).style(options(ON_HUB))
    for env in ({}, {"LOCAL_ONLY": "1"}):
        with pytest.raises(InvalidLora):
            loras(tmp_path, **env).style(options(ON_HUB))


def test_what_the_operator_has_downloaded_is_not_a_jobs_to_name(hub: Hub, tmp_path: Path) -> None:
    from image_worker.catalog import HubFile
    from image_worker.model import files

    hub.private = True
    settings = Settings.from_env({"MODEL_DIR": str(tmp_path)})
    assert files.find_adapter(HubFile(REPO, NAME), settings).is_file()
    with pytest.raises(InvalidLora):
        LoraFiles(settings).find(lora_files.OnHub(REPO, NAME, None))


def test_pull_requests_are_not_their_repos_owners() -> None:
    named, any_repo = LoraSources.parse("a/b,c/*"), LoraSources.parse("hub")
    for revision in ("refs/pr/7", "Refs/pr/7"):
        assert not named.has_repo("a/b", revision) and not named.has_repo("c/d", revision)
        assert any_repo.has_repo("a/b", revision)
    assert named.has_repo("a/b", "refsheet") and named.has_repo("c/d", None)


def test_names_of_repos_are_kept_from_callers() -> None:
    told = LoraSources.parse("folder,me/private,a.example").describe()
    assert "private" not in told and "repos that its operator chose" in told
    assert "https URLs of a.example" in told

"""The page of `compare`: as HTML, in a browser, and after a real trial of the miniature."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from image_worker import __main__ as command
from image_worker.commands.compare import card_time
from image_worker.commands.compare.job import make_job
from image_worker.commands.compare.measuring import measure
from image_worker.commands.compare.page import page
from image_worker.commands.compare.plots import Line, plot
from image_worker.commands.compare.results import results
from image_worker.commands.compare.trial import Trial
from image_worker.commands.compare.words import markdown, number
from image_worker.errors import InvalidRequest
from tests.commands.compare.stub_process import CARD, MACHINE, Stubs, Watched, trial
from tests.conftest import MINI, make_picture
from tests.worker_jobs import as_base64

EVIL = '<script>alert("1")</script>'
VOID = {"meta", "link", "img", "br", "line", "rect", "circle"}
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Tags(HTMLParser):
    """Raises where a tag is closed that is not the last one opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def refuse(variables: Mapping[str, str], order: Mapping[str, Any]) -> dict[str, Any] | None:
    """fp8 cannot be had; kernels take what they take, but for one that is not there."""
    if order["do"] == "kernels":
        timed = {"name": "GELU", "fused": 0.5, "reference": 2.0}
        return {"pairs": [timed, {"name": "product", "problem": "<b>none</b>"}]}
    if order["do"] == "card_time" and variables.get("PRECISION_MODE") == "4bit":
        return {"problem": "<u>nobody</u> may look"}
    if variables.get("PRECISION_MODE") == "fp8":
        return {"error": {"type": "does_not_fit", "message": "<i>12 GiB</i>"}}
    return None


def measured(out: Path, **changes: Any) -> tuple[Trial, dict[str, Any], str]:
    """A trial with a prompt that is a script, a way that fails, and its page."""
    job = {"prompt": EVIL, "images": [as_base64(make_picture())], "output_format": "png"}
    facts = {"job": job, "machine": MACHINE | {"card": CARD}} | changes
    this = trial(out, "bf16", "fp8", "4bit:PRECISION_MODE=4bit,LIGHTNING_STEPS=4", **facts)
    measure(this, Watched(), Stubs(refuse))
    found = results(this, f"compare --prompt '{EVIL}'")
    return this, found, page(found, this.job, out)


def test_the_page_is_html_with_all_ways(tmp_path: Path) -> None:
    _, _, text = measured(tmp_path)
    tags = Tags(text)
    for way in ("bf16", "fp8", "4bit"):
        assert any(way in part for part in tags.text.split("\n")) and way in text
    assert "did not run: does_not_fit: <i>12 GiB</i>" in tags.text
    assert "4bit: 1.30 s a picture" in tags.text
    assert "25%" in tags.text, "the kernel's share of its reference"
    assert "30.0 (75%)" in tags.text, "of the card's time, products"
    assert f".part{len(card_time.NAMES) - 1} {{" in text, "each has a colour"
    assert "4bit: not measured: <u>nobody</u> may look." in tags.text
    assert all(image["alt"] and image["src"].startswith("data:") for image in tags.all("img"))
    assert len(tags.all("img")) == 1 + 3 * 3, "the job's, and of three seeds two and a difference"
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in tags.all("svg"))
    assert all(cell["scope"] in ("row", "col") for cell in tags.all("th"))


def test_texts_are_no_markup(tmp_path: Path) -> None:
    _, _, text = measured(tmp_path)
    tags = Tags(text)
    assert not tags.all("script") and not tags.all("i") and EVIL in tags.text
    assert "<script" not in text and "a <fast> one" in tags.text


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    _, _, text = measured(tmp_path)
    tags = Tags(text)
    for _, attributes in tags.found:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "@import" not in text and "url(" not in text


def test_a_page_without_figures_is_a_page(tmp_path: Path) -> None:
    this = trial(tmp_path, "bf16", "4bit")
    found = results(this, "again")
    tags = Tags(page(found, this.job, tmp_path))
    assert "Not complete" in tags.text and "has not been measured yet" in tags.text
    assert "Nothing has been measured" in markdown(found)


def test_the_table_in_markdown(tmp_path: Path) -> None:
    _, found, _ = measured(tmp_path)
    lines = markdown(found).splitlines()
    assert lines[0].startswith("| way | start, s |")
    assert lines[2].startswith("| bf16 | 2.50 | 1.10 | 1.30 | 1.10 to 1.50 | 0.400 |")
    assert lines[3].startswith("| fp8 | does_not_fit: <i>12 GiB</i> |")
    assert {line.count("|") for line in lines[:5]} == {11}
    assert "93.8% of cases; for 95% it takes 6 runs" in markdown(found)


def test_numbers_have_three_digits() -> None:
    written = [number(value) for value in (0, 0.01234, 0.5, 1.2345, 12.345, 345.6, 9999.0)]
    assert written == ["0.00", "0.0123", "0.500", "1.23", "12.3", "346", "9999"]


def test_plots_hold_equal_and_single_values() -> None:
    assert plot("nothing", "s", [Line("a", "")]) == ""
    for values in ([1.0], [2.0, 2.0], [0.0], [1e-9, 1e9]):
        drawn = plot("a < b", "s", [Line("<a>", "1 s", dots=values, mark=values[0])])
        Tags(drawn)
        assert "nan" not in drawn and "&lt;a&gt;" in drawn


def test_the_job_is_what_was_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    make_picture().save(tmp_path / "a.png")
    job = make_job(MINI, [tmp_path / "a.png"], "make it blue", 3)
    assert base64.b64decode(job["images"][0]) == (tmp_path / "a.png").read_bytes()
    assert (job["prompt"], job["num_inference_steps"]) == ("make it blue", 3)
    with pytest.raises(InvalidRequest, match="--image needs --prompt"):
        make_job(MINI, [tmp_path / "a.png"], None, None)
    with pytest.raises(InvalidRequest, match=r"none\.png cannot be read"):
        make_job(MINI, [tmp_path / "none.png"], "make it blue", None)
    monkeypatch.chdir(tmp_path)
    assert make_job(MINI, [], None, None)["images"], "a drawn one"
    given = {"input": {"prompt": "from the file", "image": "https://a.example/b.png", "seed": 7}}
    (tmp_path / "test_input.json").write_text(json.dumps(given))
    job = make_job(MINI, [], None, None)
    assert job["prompt"] == "from the file" and "seed" not in job
    assert make_job(MINI, [], "another", None)["prompt"] == "another"


@pytest.mark.long
def test_a_real_trial_of_the_miniature(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("MODEL", "mini")
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "models"))
    out = tmp_path / "out"
    arguments = ["compare", "--ways", "bf16", "fp8", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["image_worker", *arguments])
    assert command.main() == 0
    assert f"{out / 'index.html'}" in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    assert found["complete"] and found["kernels"] == {"problem": "no card"}
    exact, other = found["ways"]
    assert exact["against"] is None and other["against"] == "bf16"
    for way in (exact, other):
        assert way["seconds"]["count"] == 5 and way["seconds"]["median"] > 0
        assert "first edit" in [step["name"] for step in way["start"]["steps"]]
        assert way["host"] > 2**27 and way["steps"] == 1 and way["settings"]["MODEL"] == "mini"
        for one in way["pictures"]:
            with Image.open(out / one["file"]) as image:
                assert image.size == (128, 128)
    assert all(one["psnr"] > 25 and one["ssim"] > 0.8 for one in other["pictures"])
    Tags((out / "index.html").read_text())
    assert found["command"].startswith("MODEL=mini") and "--steps 1" in found["command"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield opened
        opened.close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_it_is_shown_and_asks_for_nothing(
    width: int, scheme: str, tmp_path: Path, browser: Any
) -> None:
    _, _, text = measured(tmp_path)
    (tmp_path / "index.html").write_text(text)
    problems: list[str] = []
    shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    shown.on("console", lambda message: problems.append(message.text))
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.on("request", lambda request: problems.append(request.url))
    url = (tmp_path / "index.html").as_uri()
    shown.goto(url)
    assert [one for one in problems if one != url and not one.startswith("data:")] == []
    plots = shown.locator("svg.plot")
    assert plots.count() == 5, "seconds, memory of the host, PSNR, SSIM, the card's time"
    for place in range(plots.count()):
        box = plots.nth(place).bounding_box()
        assert box is not None and box["width"] > 250 and box["height"] > 50
    broken = "[...document.images].filter((image) => !image.naturalWidth).length"
    assert shown.evaluate(broken) == 0
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    shown.close()

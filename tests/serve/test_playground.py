"""The playground, in a headless Chromium, on a server that serves the miniature."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import requests
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.conftest import make_picture
from tests.serve.served import serving

KEY = "the-right-key"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
# Nothing here may call home.
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.long,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium: install the package `chromium`, or Google Chrome, on the PATH",
    ),
]

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """The URLs of a server without and of one with an API key."""
    worker = Worker.from_settings(Settings.from_env({"MODEL": "mini"}))
    with serving(worker) as without_key, serving(worker, API_KEY=KEY) as with_key:
        yield f"{without_key}/", f"{with_key}/"
    worker.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)  # milliseconds, for machines that are busy
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, servers: tuple[str, str]) -> Iterator[Open]:
    """Opens the page. At the end there must be no error and no request to another host."""
    contexts, problems = [], []

    def opened(url: str = servers[0], **options: Any) -> Page:
        context = chromium.new_context(**options)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(30_000)

        def requested(request: Any) -> None:
            if not request.url.startswith((url, "blob:", "data:")):
                problems.append(request.url)

        def said(message: Any) -> None:
            # Chromium reports every answer that is an error, and every connection lost.
            if message.type == "error" and "Failed to load resource" not in message.text:
                problems.append(message.text)

        page.on("request", requested)
        page.on("console", said)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def test_an_example_runs_to_a_result(open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#server")).to_contain_text("mini")
    _fill_example(page)
    _set(page, seed="7", num_inference_steps="60")
    page.get_by_role("button", name="Run").click()
    bar = page.get_by_role("progressbar")
    expect(bar).to_have_attribute("aria-valuemax", "60")
    expect(page.locator("#steps")).to_contain_text("s left")
    expect(page.locator("#after")).to_have_attribute("src", _starts("data:image/jpeg;base64,"))
    _wait_for_result(page)
    expect(bar).to_be_hidden()
    expect(page.locator("#facts")).to_contain_text("mini, bf16")
    expect(page.locator("#warnings")).to_contain_text("this job had 60")
    red, blue = _middle(page.locator("#before")), _middle(page.locator("#after"))
    assert red[0] > 150 > red[2]
    assert blue[2] > 150 > blue[0]


def test_the_slider_moves_by_keyboard_and_by_pointer(open_page: Open) -> None:
    page = _with_result(open_page())
    slider = page.get_by_role("slider")
    expect(slider).to_have_attribute("aria-valuenow", "50")
    slider.focus()
    for key, value in (("ArrowRight", 52), ("PageUp", 62), ("Home", 0), ("ArrowLeft", 0)):
        slider.press(key)
        expect(slider).to_have_attribute("aria-valuenow", str(value))
    slider.press("End")
    box = page.locator("#compare").bounding_box()
    knob = slider.bounding_box()
    assert box and knob
    assert abs(knob["x"] + knob["width"] / 2 - box["x"] - box["width"]) < 2
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + 20)
    expect(slider).to_have_attribute("aria-valuenow", "25")


def test_results_are_chosen_saved_and_used_again(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    _fill_example(page)
    _set(page, seed="5", num_images="2", output_format="webp", quality="80")
    page.locator("#prompt").press("Control+Enter")
    _wait_for_result(page)
    page.get_by_role("button", name="Result 2, seed 6").click()
    expect(page.locator("#facts .seed dd")).to_have_text("6")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "edit-6.webp"
    download.value.save_as(tmp_path / "saved.webp")
    assert Image.open(tmp_path / "saved.webp").size == (128, 128)
    page.get_by_role("button", name="Keep this seed").click()
    expect(page.locator("#seed")).to_have_value("6")
    page.get_by_role("button", name="Use as input").click()
    expect(page.get_by_alt_text("edit-6.webp")).to_be_visible()
    page.locator("#prompt").fill("make the blue circle green")
    page.get_by_role("button", name="Run").click()
    _wait_for_result(page)


def test_what_is_copied_runs(open_page: Open, servers: tuple[str, str], tmp_path: Path) -> None:
    page = open_page()
    _fill_example(page)
    page.locator("#prompt").fill('it\'s "red" $HOME `date`\nJOB\nmake the red circle blue')
    _set(page, num_inference_steps="2")
    page.get_by_text("The same job from code").click()
    page.get_by_role("button", name="Copy JSON").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    job = json.loads(page.evaluate("navigator.clipboard.readText()"))
    reply = requests.post(f"{servers[0]}runsync", json=job, timeout=60).json()
    assert reply["status"] == "COMPLETED"
    if shutil.which("curl"):
        page.get_by_role("button", name="Copy curl").click()
        expect(page.get_by_role("button", name="Copied")).to_have_count(2)
        command = page.evaluate("navigator.clipboard.readText()")
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
        answer = json.loads((tmp_path / "answer.json").read_text())
        assert answer["output"]["prompt"] == job["input"]["prompt"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Save job.json").click()
    assert json.loads(Path(download.value.path()).read_text()) == job


def test_large_pictures_are_not_pasted(open_page: Open, tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (256, 256), os.urandom(256 * 256 * 3))
    noise.save(tmp_path / "noise.png")
    page = open_page()
    page.locator("#image").set_input_files(tmp_path / "noise.png")
    page.get_by_text("The same job from code").click()
    expect(page.locator("#command")).to_contain_text("-d @job.json")


def test_errors_are_shown_at_their_fields(open_page: Open) -> None:
    page = open_page()
    run = page.get_by_role("button", name="Run")
    run.click()
    expect(page.locator("#prompt-error")).to_have_text("Say what should be different.")
    expect(page.locator("#prompt")).to_be_focused()
    page.locator("#prompt").fill("make the red circle blue")
    run.click()
    expect(page.locator("#image-error")).to_have_text("Add a picture to edit.")
    _fill_example(page)
    _set(page, seed="abc", width="100")
    run.click()
    expect(page.locator("#seed-error")).to_have_text("Input should be a valid integer.")
    expect(page.locator("#width-error")).to_contain_text("multiple of 16")
    expect(page.locator("#seed")).to_have_attribute("aria-invalid", "true")
    _set(page, seed="9223372036854775807", width="")
    run.click()
    expect(page.locator("#seed-error")).to_contain_text("numbers up to 9007199254740991")
    _set(page, seed="")
    run.click()
    _wait_for_result(page)
    expect(page.locator(".error")).to_have_count(0)


def test_pictures_are_added_and_removed(open_page: Open, tmp_path: Path) -> None:
    for number in range(4):
        make_picture(seed=number).save(tmp_path / f"{number}.png")
    (tmp_path / "text.png").write_text("no picture")
    page = open_page()
    files = page.locator("#image")
    files.set_input_files([tmp_path / "0.png", tmp_path / "text.png"])
    expect(page.locator("#image-error")).to_have_text("Not a picture: text.png.")
    files.set_input_files([tmp_path / f"{number}.png" for number in range(4)])
    expect(page.locator("#image-error")).to_contain_text("takes 4 at most")
    expect(page.locator("#pictures li")).to_have_count(4)
    page.get_by_role("button", name="Remove picture 1, 0.png").click()
    page.get_by_role("button", name="Remove picture 3, 2.png").click()
    expect(page.locator("#pictures .tag:visible")).to_have_text(["1", "2"])
    page.evaluate(_PASTE)
    expect(page.get_by_alt_text("pasted.png")).to_be_visible()
    page.locator("#prompt").fill("swap the red circle and the blue square")
    page.get_by_role("button", name="Run").click()
    _wait_for_result(page)


def test_a_job_is_cancelled(open_page: Open) -> None:
    page = open_page()
    _fill_example(page)
    _set(page, num_inference_steps="100", num_images="4")
    with page.expect_response("**/run?*") as accepted:
        page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuemax", "100")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    with page.expect_response("**/cancel/*") as cancelled:
        page.get_by_role("button", name="Cancel").click()
    assert cancelled.value.json()["status"] == "CANCELLED"
    assert cancelled.value.json()["id"] == accepted.value.json()["id"]
    expect(page.locator("#status")).to_have_text("Cancelled")
    expect(page.get_by_role("button", name="Run")).to_be_focused()
    job_id = accepted.value.json()["id"]
    later = page.request.get(urljoin(page.url, f"status/{job_id}")).json()
    assert later["status"] == "CANCELLED" and "output" not in later


def test_a_key_is_asked_for_where_one_is_needed(open_page: Open, servers: tuple[str, str]) -> None:
    page = open_page(servers[1])
    key = page.get_by_label("API key")
    _fill_example(page)
    expect(key).to_be_hidden()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#key-error")).to_have_text("This server wants a key.")
    key.fill("a wrong one")
    key.press("Enter")
    expect(page.locator("#key-error")).to_have_text("This key is not the right one.")
    key.fill(KEY)
    key.press("Enter")
    _wait_for_result(page)
    expect(key).to_be_hidden()
    page.get_by_text("The same job from code").click()
    expect(page.locator("#command")).to_contain_text("Bearer $API_KEY")
    assert KEY not in page.locator("#command").inner_text()
    assert page.evaluate("localStorage.length") == 0


def test_a_full_queue_is_waited_for(open_page: Open) -> None:
    page = open_page()
    error = {"type": "queue_full", "message": "9 jobs are waiting", "retryable": True}

    def full(route: Route) -> None:
        route.fulfill(status=429, headers={"Retry-After": "1"}, json={"error": error})

    page.route("**/run?*", full, times=1)
    _fill_example(page)
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#steps")).to_have_text("Trying again in 1 s")
    _wait_for_result(page)


def test_a_job_outlives_its_connection(open_page: Open) -> None:
    page = open_page()
    page.route("**/stream/*", lambda route: route.abort())
    page.route("**/status/*", lambda route: route.abort(), times=1)
    _fill_example(page)
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#status")).to_contain_text("The connection was lost")
    _wait_for_result(page)


def test_links_to_results_are_shown_and_texts_are_no_markup(
    open_page: Open, servers: tuple[str, str], tmp_path: Path
) -> None:
    make_picture().save(tmp_path / "kept.png")
    link = f"{servers[0]}kept.png"
    made = {"width": 128, "height": 128, "seeds": [1], "output_format": "png", "precision": "4bit"}
    output = made | {"image_urls": [link], "num_inference_steps": 8, "true_cfg_scale": 1}
    output |= {"model": "<b>", "timings": {"total": 1}, "warnings": ["<img src=x>"]}
    done = json.dumps({"status": "COMPLETED", "output": output})
    page = open_page()
    page.route(link, lambda route: route.fulfill(path=tmp_path / "kept.png"))
    page.route("**/stream/*", lambda route: route.fulfill(body=f"event: done\ndata: {done}\n\n"))
    _fill_example(page)
    page.get_by_role("button", name="Run").click()
    _wait_for_result(page)
    expect(page.locator("#warnings")).to_have_text("Note: <img src=x>.")
    expect(page.get_by_role("link", name="Download")).to_have_attribute("href", link)
    page.get_by_role("button", name="Use as input").click()
    page.get_by_text("The same job from code").click()
    expect(page.locator("#command")).to_contain_text('"image": "http')


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(open_page: Open, scheme: str) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, color_scheme=scheme)
    _with_result(page)
    for summary in page.locator("summary").all():
        summary.click()
    _set(page, seed="abc")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#seed-error")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


_PASTE = """async () => {
  const blob = await new Promise((done) => document.createElement("canvas").toBlob(done));
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File([blob], "pasted.png", { type: "image/png" }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
}"""

_MIDDLE = """(image) => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d");
  const [x, y] = [image.naturalWidth / 2, image.naturalHeight / 2];
  pen.drawImage(image, x, y, 1, 1, 0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data];
}"""


def _fill_example(page: Page) -> None:
    page.get_by_role("button", name="Try an example").click()
    expect(page.locator("#pictures li")).to_have_count(1)


def _set(page: Page, **options: str) -> None:
    if not page.locator("#fields").is_visible():
        page.locator("#options summary").click()
    for name, value in options.items():
        control = page.locator(f"#{name}")
        if control.evaluate("(control) => control.tagName") == "SELECT":
            control.select_option(value)
        else:
            control.fill(value)


def _with_result(page: Page) -> Page:
    _fill_example(page)
    page.get_by_role("button", name="Run").click()
    _wait_for_result(page)
    return page


def _wait_for_result(page: Page) -> None:
    expect(page.locator("#status")).to_have_text("Done")
    expect(page.get_by_alt_text("The result")).to_be_visible()


def _middle(image: Locator) -> list[int]:
    """The colour of its middle."""
    found: list[int] = image.evaluate(_MIDDLE)
    return found


def _starts(text: str) -> Any:
    return re.compile(f"^{re.escape(text)}")

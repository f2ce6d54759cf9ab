"""The page in Chromium, against the server with the demonstration model: ``make browser-check``.

Nothing is switched off: the server's Content-Security-Policy holds, and each of the browser's complaints fails a test.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.browser]
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'madformer[serve]'")

ROOT = Path(__file__).parents[2]
AXE = ROOT / "build" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
MOST = 4
"""Images of a request, and of all that are drawn and wait."""
WATCH = """() => {
  Object.assign(window, {seen: [], bars: {}, covers: {}});
  const look = () => {
    const cells = [...document.querySelectorAll(".cell")];
    const made = cells.flatMap((cell, i) => cell.matches(".made") ? [i] : []);
    bars[made.length] = document.getElementById("progress").value;
    covers[made.length] = getComputedStyle(cells.at(-1), "::before").opacity;
    if (JSON.stringify(made) !== JSON.stringify(seen.at(-1))) seen.push(made);
  };
  const every = {subtree: true, childList: true, attributes: true};
  new MutationObserver(look).observe(document.getElementById("pictures"), every);
}"""
"""Keeps which blocks were there, whenever that changed, and for each number of them the progress and the last cover."""
PIXELS = """(image) => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [canvas.height, canvas.width, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
}"""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    import torch

    from madformer import MADFormerPipeline

    return MADFormerPipeline.from_pretrained(ROOT / "assets" / "emoji64", dtype=torch.float32)


@pytest.fixture(scope="module")
def server(pipeline: Any) -> Iterator[str]:
    """Its address."""
    from madformer.engine import SamplingOptions
    from madformer.serving import ServerSettings
    from tests.helpers.serving_cases import serving

    settings = ServerSettings(slots=MOST // 2, max_waiting=MOST // 2, max_images=MOST)
    with serving(pipeline, settings, defaults=SamplingOptions(steps=8, guidance=3.0), name="emoji64") as running:
        yield f"{running.url}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium (Debian: chromium; or CHROMIUM=PATH): the page is NOT tested here")
    playwright.expect.set_options(timeout=60_000)  # a machine may be busy
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A browser that has never been here, at the page."""

    def __init__(self, browser: Any, url: str, *, routes: dict[str, Any] | None = None, **settings: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **settings})
        self.page, self.url, self.complaints = self.context.new_page(), url, list[str]()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        self.page.on("request", lambda request: self.look_at(request.url))
        for pattern, handler in (routes or {}).items():
            self.page.route(pattern, handler)
        self.page.goto(url)

    def look_at(self, url: str) -> None:
        if not url.startswith((self.url, "data:", f"blob:{self.url}")):
            self.complaints.append(f"asked for {url}")

    def close(self) -> None:
        self.context.close()
        assert not self.complaints

    def draw(self, prompt: str, *, seed: int | None = None, count: int = 1) -> None:
        """Ask, and do not wait."""
        self.page.fill("#prompt", prompt)
        if seed is not None:
            self.page.fill("#seed", str(seed))
        self.page.locator("#counts label", has_text=str(count)).click()
        self.page.get_by_role("button", name="Draw", exact=True).click()

    def made(self, blocks: int) -> None:
        """Wait for so many blocks."""
        if blocks:
            self.page.locator(".cell.made").nth(blocks - 1).wait_for(state="attached")

    def done(self) -> None:
        self.page.locator("#said", has_text="Finished").wait_for()
        playwright.expect(self.page.locator("#draw")).to_have_text("Draw")

    def pixels(self, picture: int = 0) -> np.ndarray:
        """``(H, W, 3)``."""
        height, width, data = self.page.locator(".frame img").nth(picture).evaluate(PIXELS)
        return np.array(data, dtype=np.int16).reshape(height, width, 4)[..., :3]

    @property
    def entries(self) -> Any:
        return self.page.locator("#history-list .kept")


@pytest.fixture
def visit(browser: Any, server: str) -> Iterator[Visit]:
    visit = Visit(browser, server)
    yield visit
    visit.close()


def test_blocks_appear_one_after_another(visit: Visit, pipeline: Any) -> None:
    page = visit.page
    playwright.expect(page.locator(".cell")).to_have_count(4)
    page.evaluate(WATCH)
    visit.draw("red apple", seed=5)
    visit.done()
    # what is not made is covered, and the progress is told
    assert page.evaluate("covers[2]") == "1"
    assert 0.4 < float(page.evaluate("bars[2]")) < 1
    assert page.evaluate("seen")[-4:] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]

    drawn = np.asarray(
        pipeline("red apple", seed=5, num_inference_steps=8, guidance_scale=3.0).images[0], dtype=np.int16
    )
    assert abs(visit.pixels() - drawn).max() <= 2
    playwright.expect(page.locator(".picture img")).to_have_attribute("alt", "red apple, seed 5")
    with page.expect_download() as started:
        page.get_by_role("link", name="Download picture 1").click()
    assert started.value.suggested_filename == "madformer-5.png"
    assert Path(started.value.path()).read_bytes().startswith(b"\x89PNG")


def test_a_block_is_drawn_anew_and_may_be_taken_back(visit: Visit) -> None:
    page = visit.page
    visit.draw("grinning face", seed=1, count=2)
    visit.done()
    before, neighbour = visit.pixels(0), visit.pixels(1)
    cells = page.locator(".picture").nth(0).locator(".cell")
    cells.nth(3).click()
    visit.done()
    after = visit.pixels(0)
    changed = abs(after - before).reshape(2, 32, 2, 32, 3).mean((1, 3, 4))
    # what is kept went through the autoencoder, too
    assert changed[1, 1] > 2 * changed[0].max()
    assert (visit.pixels(1) == neighbour).all()
    page.get_by_role("button", name="Undo").click()
    playwright.expect(page.locator(".picture").nth(0).get_by_text("Seed 1", exact=True)).to_be_visible()
    assert (visit.pixels(0) == before).all()

    # several, by the keyboard alone
    sent = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
    cells.nth(0).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+Enter")
    playwright.expect(cells.nth(2)).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Redraw 2 blocks").press("Enter")
    visit.done()
    assert [request["blocks"] for request in sent] == [[2, 3]]
    assert sent[0]["prompt"] == "grinning face"


def test_history_survives_a_reload(visit: Visit) -> None:
    page = visit.page
    visit.draw("blue heart", seed=3)
    visit.done()
    kept = visit.pixels()
    visit.draw("tangerine", seed=4)
    visit.done()
    playwright.expect(visit.entries).to_have_count(2)
    page.reload()
    playwright.expect(visit.entries).to_have_count(2)
    visit.entries.nth(1).click()
    playwright.expect(page.locator("#prompt")).to_have_value("blue heart")
    playwright.expect(page.locator("#seed")).to_have_value("3")
    playwright.expect(page.locator(".picture img")).to_have_attribute("alt", "blue heart, seed 3")
    assert (visit.pixels() == kept).all()
    page.get_by_role("button", name="Remove blue heart, seed 3").click()
    playwright.expect(visit.entries).to_have_count(1)
    page.get_by_role("button", name="Remove all").click()
    page.get_by_role("button", name="Remove them").click()
    page.reload()
    playwright.expect(page.get_by_text("What you draw is kept here")).to_be_visible()


def test_a_reload_in_the_middle_goes_on(visit: Visit) -> None:
    page = visit.page
    page.fill("#steps", "20")
    visit.draw("thumbs up", seed=9)
    visit.made(1)
    page.reload()
    visit.done()
    playwright.expect(page.locator(".picture img")).to_have_attribute("alt", "thumbs up, seed 9")
    playwright.expect(visit.entries).to_have_count(1)


def test_stopping_frees_the_server(visit: Visit, server: str) -> None:
    page = visit.page
    page.fill("#steps", "50")
    page.fill("#prompt", "couple with heart")
    page.locator("#prompt").press("Control+Enter")
    visit.made(1)
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#said")).to_have_text("Stopped")
    deadline = time.monotonic() + 4  # the server's own patience with a client that went away is 5 s
    while page.request.get(f"{server}api/v1/status").json()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    playwright.expect(page.locator("#alert")).to_be_empty()
    playwright.expect(visit.entries).to_have_count(0)


def test_errors_are_told_in_plain_words(browser: Any, server: str) -> None:
    other, visit = Visit(browser, server), Visit(browser, server)
    page = visit.page
    other.page.fill("#steps", "50")
    other.draw("red apple", count=MOST)
    other.made(1)
    visit.draw("red apple", seed=8)
    playwright.expect(page.get_by_role("alert")).to_contain_text(
        re.compile(r"as much to do as it takes.*again in \d+ s")
    )
    playwright.expect(page.locator("#said")).to_have_text("Not drawn")
    other.page.get_by_role("button", name="Stop").click()
    other.close()
    page.get_by_role("button", name="Try again").click()
    visit.done()
    playwright.expect(page.get_by_role("alert")).to_be_empty()

    refused = {"error": {"message": "label='Cheese' is no class", "type": "invalid_request_error"}}
    page.route("**/api/v1/images", lambda route: route.fulfill(status=400, json=refused))
    visit.draw("red apple")
    playwright.expect(page.get_by_role("alert")).to_contain_text("label='Cheese' is no class")
    page.unroute("**/api/v1/images")
    page.route("**/api/v1/images", lambda route: route.abort())
    page.get_by_role("button", name="Try again").click()
    playwright.expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    page.unroute("**/api/v1/images")
    page.get_by_role("button", name="Try again").click()
    visit.done()
    # the browser's own lines on answers that are errors, and the page's
    visit.complaints = [
        line for line in visit.complaints if "Failed to load resource" not in line and "Error" not in line
    ]
    visit.close()


def test_a_key_is_asked_for_and_kept_for_the_tab(browser: Any, server: str) -> None:
    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "an API key is needed", "type": "x"}})

    visit = Visit(browser, server, routes={"**/api/**": guard})
    page = visit.page
    for key, hint in (("wrong", "kept until this tab is closed"), ("right", "does not know that key")):
        playwright.expect(page.locator("#key-hint")).to_contain_text(hint)
        page.fill("#key-value", key)
        page.keyboard.press("Enter")
    playwright.expect(page.locator("#model-name")).to_have_text("emoji64")
    visit.draw("red apple")
    visit.done()
    page.get_by_role("button", name="As code").click()
    playwright.expect(page.locator("#curl")).to_contain_text("Bearer $MADFORMER_API_KEY")
    assert "right" not in page.locator("#code").inner_text()
    page.reload()
    playwright.expect(page.locator("#model-name")).to_have_text("emoji64")
    assert all("401" in line for line in visit.complaints)
    visit.complaints.clear()
    visit.close()


def test_the_split_of_an_elastic_model(browser: Any, server: str) -> None:
    def elastic(route: Any) -> None:
        card = route.fetch().json()
        route.fulfill(json={**card, "elastic": [1, 2, 3, 5], "diffusion_layers": 3, "num_layers": 6})

    visit = Visit(browser, server, routes={"**/api/v1/model": elastic})
    page = visit.page
    sent: list[Any] = []
    page.route("**/api/v1/images", lambda route: (sent.append(route.request.post_data_json), route.abort()))
    playwright.expect(page.locator("#split-text")).to_contain_text("3 autoregressive, 3 diffusion")
    page.get_by_label("Layers: autoregressive and diffusion").press("ArrowRight")
    playwright.expect(page.locator("#split")).to_have_attribute("aria-valuetext", "1 autoregressive, 5 diffusion")
    visit.draw("red apple", seed=2)
    playwright.expect(page.get_by_role("alert")).not_to_be_empty()
    assert sent == [
        {"prompt": "red apple", "steps": 8, "guidance_scale": 3, "seed": 2, "diffusion_layers": 5},
    ]
    visit.complaints.clear()
    visit.close()


def test_the_code_asks_for_the_same(visit: Visit, tmp_path: Path) -> None:
    """Run as it stands there, with a prompt that a shell and Python read otherwise than it is meant."""
    import subprocess
    import sys

    prompt = """it's "red" $HOME `id` \\ apple"""
    visit.draw(prompt, seed=6)
    visit.done()
    visit.page.get_by_role("button", name="As code").click()
    curl, python = (visit.page.locator(f"#{name}").inner_text() for name in ("curl", "python"))
    subprocess.run(["sh", "-c", curl], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", python], cwd=tmp_path, check=True, env={**os.environ})
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "6.png").read_bytes()
    assert json.loads(re.search(r"--data-raw '(.*)' \\", curl)[1].replace("'\\''", "'"))["prompt"] == prompt  # type: ignore[index]
    from PIL import Image

    assert (np.asarray(Image.open(tmp_path / "6.png").convert("RGB")) == visit.pixels()).all()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_stands_in_the_way_of_anybody(browser: Any, server: str, scheme: str) -> None:
    """axe-core's rules, at every state of the page; then a phone's width, which nothing is wider than."""
    if not AXE.is_file():
        pytest.skip("no axe-core: `make browser-check` fetches it with npm")
    visit = Visit(browser, server, color_scheme=scheme)
    page = visit.page

    def check(state: str) -> None:
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate("async () => (await axe.run()).violations")
        serious = [
            (state, one["id"], one["help"], [node["html"] for node in one["nodes"]])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert not serious

    playwright.expect(page.locator(".cell")).to_have_count(4)
    page.locator("#more summary").click()
    check("at first")
    page.fill("#steps", "20")
    visit.draw("woman cook: medium skin tone")
    visit.made(2)
    page.wait_for_timeout(600)
    check("half made")
    visit.done()
    page.wait_for_timeout(600)
    page.locator(".cell").nth(1).click(modifiers=["Shift"])
    check("finished, a block chosen")
    for opener, closer in (("As code", "Close"), ("Remove all", "Keep them")):
        page.get_by_role("button", name=opener).click()
        check(opener)
        page.get_by_role("button", name=closer).click()
    page.route("**/api/v1/images", lambda route: route.abort())
    page.get_by_role("button", name="Draw", exact=True).click()
    playwright.expect(page.get_by_role("alert")).not_to_be_empty()
    check("an error")
    visit.complaints.clear()
    visit.close()


def test_a_phone_scrolls_down_only(browser: Any, server: str) -> None:
    visit = Visit(browser, server, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = visit.page
    playwright.expect(page.locator(".cell")).to_have_count(4)
    assert not page.locator("#settings").get_attribute("open")
    for fold in ("#settings", "#more"):
        page.locator(f"{fold} > summary").click()
    visit.draw("W" * 300, count=4)
    visit.done()
    page.get_by_role("button", name="As code").click()

    def width() -> int:
        return page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")

    assert width() == 360
    page.get_by_role("button", name="Close").click()
    page.route("**/api/v1/images", lambda route: route.fulfill(status=400, json={"error": {"message": "W" * 300}}))
    page.get_by_role("button", name="Draw", exact=True).click()
    playwright.expect(page.get_by_role("alert")).not_to_be_empty()
    assert width() == 360
    visit.complaints.clear()
    visit.close()

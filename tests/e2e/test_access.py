"""How pictures get in, what must stay out, and whether everybody can read and use the page."""

import re
import time
import zipfile
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import PATIENCE, Server, open_app, unfold
from tests.e2e.test_app import CACTUS, SAILBOAT, choose, open_settings, set_slider, start_long, wait_drawn, wait_rebuilt

LIMIT = 20 * 2**20  # bytes of an upload
_FIRE = """([kind, where, bytes]) => {
  const data = new DataTransfer(), options = { bubbles: true, cancelable: true };
  data.items.add(new File([new Uint8Array(bytes)], "image.png", { type: "image/png" }));
  document.querySelector(where).dispatchEvent(kind === "drop"
    ? new DragEvent("drop", { dataTransfer: data, ...options })
    : new ClipboardEvent("paste", { clipboardData: data, ...options }));
}"""
_NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, select, img, [role=tab]")]
  .filter((e) => e.checkVisibility() && e.type !== "file")
  .filter((e) => ![e.ariaLabel, e.title, e.alt, e.innerText, e.labels?.[0]?.innerText, e.querySelector("img")?.alt,
    (e.tagName === "IMG" ? e.closest("button") : null)?.ariaLabel].some((text) => text?.trim()))
  .map((e) => e.outerHTML.slice(0, 150))"""
_CONTRAST = """(selector) => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => channels(text).slice(0, 3)
    .map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const element = document.querySelector(selector);
  let behind = element;
  const colour = (e) => getComputedStyle(e).backgroundColor;
  while (channels(colour(behind))[3] === 0) behind = behind.parentElement;
  const both = [light(getComputedStyle(element).color), light(colour(behind))];
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""


def fire(page: Page, kind: str, where: str, path: Path) -> None:
    """A picture dropped or pasted there."""
    page.evaluate(_FIRE, [kind, where, list(path.read_bytes())])


def test_pictures_come_by_drop_and_by_paste(page: Page) -> None:
    fire(page, "drop", "#picture .upload-container .wrap", CACTUS)
    wait_rebuilt(page)
    page.get_by_role("button", name="Add a picture").click()
    expect(page.locator("#card-B")).to_be_visible()
    fire(page, "paste", "#prompt textarea", SAILBOAT)
    expect(page.locator("#card-B .picture img").first).to_be_visible()
    expect(page.locator("#budget .bar")).to_have_attribute("aria-label", re.compile("slots for the pictures"))


def test_what_is_dropped_beside_the_zones_lands_in_a_card_and_leaves_the_page(page: Page) -> None:
    page.locator("#prompt textarea").fill("<image> at night")
    fire(page, "drop", "#header", CACTUS)
    wait_rebuilt(page)
    expect(page.locator("#prompt textarea")).to_have_value("<image> at night")


def test_a_file_that_is_too_large_is_refused_by_page_and_server(page: Page, server: Server, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(CACTUS.read_bytes() + bytes(LIMIT))
    choose(page, large)
    expect(page.get_by_text("exceed the maximum allowed size of 20.0 Mb")).to_be_visible()
    with large.open("rb") as file:
        answer = httpx.post(f"{server.url}/gradio_api/upload", files={"files": file}, timeout=PATIENCE / 1000)
    assert answer.status_code == 413


def test_files_of_the_server_stay_there(page: Page, server: Server) -> None:
    for path in ("/etc/passwd", str(CACTUS), "../../etc/passwd"):
        assert page.request.get(f"{server.url}/gradio_api/file={path}").status in (403, 404)
    for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
        call = page.request.post(
            f"{server.url}/gradio_api/call/encode",
            data={"data": [{"path": str(CACTUS), **meta}, "", "A", 1, 4, "crop"]},
        )
        answer = page.request.get(f"{server.url}/gradio_api/call/encode/{call.json()['event_id']}").text()
        assert "event: error" in answer and ".vilex" not in answer, answer


def test_all_pictures_download_at_once(page: Page, tmp_path: Path) -> None:
    page.locator("#prompt textarea").fill("a red boat")
    open_settings(page)
    set_slider(page, "num-images", 2)
    page.get_by_role("button", name="Generate").click()
    wait_drawn(page, 2)
    with page.expect_download() as saved:
        page.locator("#gallery").get_by_label("Download All").click()
    saved.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as file:
        assert len(file.namelist()) == 2 and all(name.endswith(".png") for name in file.namelist())


def test_closing_the_page_stops_its_work(browser: Browser, server: Server) -> None:
    before = server.log.count("stopped after step")
    with browser.new_context() as context:
        start_long(open_app(context.new_page(), server.url))
    deadline = time.monotonic() + PATIENCE / 1000
    while server.log.count("stopped after step") == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_every_control_and_picture_has_a_name(page: Page) -> None:
    choose(page, CACTUS)
    wait_rebuilt(page)
    for name in ("Adjust picture A", "Settings", "Sampler", "Keep picture A as a word"):
        unfold(page, name)
    for tab in ("Pictures", "Blend", "Balance", "Inspect", "Compare", "History", "About", "Ladder"):
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tabpanel").filter(visible=True)).to_have_count(1)
        assert page.evaluate(_NAMELESS) == [], tab


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(browser: Browser, server: Server, theme: str) -> None:
    with browser.new_context() as context:
        page = open_app(context.new_page(), f"{server.url}/?__theme={theme}")
        background = page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
        assert all((level < 60) == (theme == "dark") for level in map(int, re.findall(r"\d+", background)))
        for place in ("#header h1", "#header p", "#prompt textarea", "#status p", "#budget .legend", "#generate"):
            assert page.evaluate(_CONTRAST, place) >= 4.5, place


def test_the_page_says_what_a_picture_costs_here(page: Page) -> None:
    cost = re.compile(r"Running on the CPU: about \d+(\.\d)? (s|min) per picture of 3 steps on this machine")
    expect(page.get_by_role("note")).to_contain_text(cost)

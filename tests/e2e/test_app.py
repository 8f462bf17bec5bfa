"""What a user does, in a real browser against the real app."""

import re
import runpy
from io import BytesIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageStat
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import ROOT, Server, open_app, start_app, stop_app, unfold, wait_until_up
from vilex.codes import load_code
from vilex.config import DEFAULT_MODEL
from vilex.recipe import load_recipe

CACTUS = ROOT / "assets" / "examples" / "cactus.png"
SAILBOAT = ROOT / "assets" / "examples" / "sailboat.png"
RUNGS = ("rung-1", "rung-2", "rung-3")  # of 1, 16 and 75 tokens


def choose(page: Page, path: Path) -> None:
    """Puts a file into the drop zone, in place of the one that is there."""
    page.locator("#picture input[type=file]").set_input_files(path)


def wait_rebuilt(page: Page, old: str = "none") -> list[str]:
    """Addresses of the three reconstructions once they are all there and the last is not `old`."""
    result = re.compile(f"^(?!{re.escape(old)}$).*/vilex-75-tokens")
    expect(page.locator("#rung-3 img")).to_have_attribute("src", result)
    return [page.locator(f"#{rung} img").get_attribute("src") for rung in RUNGS]


def wait_drawn(page: Page, count: int, old: str = "none") -> list[str]:
    """Addresses of the gallery's pictures once they are all there and the first is not `old`."""
    pictures = page.locator("#gallery .thumbnail-item img")
    result = re.compile(f"^(?!{re.escape(old)}$).*/vilex-seed-")
    expect(pictures.first).to_have_attribute("src", result)
    expect(pictures).to_have_count(count)
    return [picture.get_attribute("src") for picture in pictures.all()]


def open_settings(page: Page) -> None:
    unfold(page, "Settings")
    page.locator("#num-images input[type=number]").wait_for()


def set_slider(page: Page, name: str, value: int) -> None:
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def start_long(page: Page) -> None:
    """Asks for more than a test can wait for, and returns while it is drawn."""
    page.locator("#prompt textarea").fill("a blue house")
    open_settings(page)
    set_slider(page, "num-inference-steps", 100)
    set_slider(page, "num-images", 8)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"step \d+ of 100"))


def download(page: Page, address: str) -> bytes:
    response = page.request.get(address)
    assert response.ok and response.headers["content-type"] == "image/png"
    return response.body()


def test_a_picture_is_rebuilt_from_three_budgets_with_recipes(page: Page) -> None:
    choose(page, CACTUS)
    files = [download(page, address) for address in wait_rebuilt(page)]
    assert [load_recipe(file).config.num_tokens for file in files] == [1, 16, 75]
    assert all(max(ImageStat.Stat(Image.open(BytesIO(file))).stddev) > 1 for file in files)
    for rung, name in zip(RUNGS, ("1 token", "16 tokens", "75 tokens"), strict=True):
        expect(page.locator(f"#{rung}")).to_contain_text(re.compile(name + r"\s*\d+ % alike · \d+(\.\d)? s"))
    unfold(page, "Adjust picture A")
    expect(page.get_by_role("img", name="Picture A as the encoder sees it")).to_be_visible()


def test_words_and_picture_are_mixed_and_the_budget_is_shown_first(page: Page) -> None:
    choose(page, CACTUS)
    wait_rebuilt(page)
    expect(page.get_by_label("range slider for Words against picture (TFG)")).to_be_disabled()
    page.get_by_label("Prompt", exact=False).first.fill("<image>, in the style of <b>Claude</b> Monet")
    spent = re.compile(r"75 slots for the picture, [1-9]\d* for words")
    expect(page.locator("#budget .bar")).to_have_attribute("aria-label", spent)
    expect(page.locator("#budget .reading b")).to_have_count(0)
    expect(page.get_by_label("range slider for Words against picture (TFG)")).to_be_enabled()
    open_settings(page)
    set_slider(page, "num-images", 2)
    page.get_by_role("button", name="Generate").click()
    recipes = [load_recipe(download(page, address)) for address in wait_drawn(page, 2)]
    seed = int(page.get_by_label("Seed", exact=True).input_value())
    assert [recipe.config.seed for recipe in recipes] == [seed, seed + 1]
    assert recipes[0].prompt == "<image>, in the style of <b>Claude</b> Monet"


def test_the_budget_counts_tokens_and_not_letters(page: Page) -> None:
    page.locator("#prompt textarea").fill("猫 🐈")
    bar = page.locator("#budget .bar")
    expect(bar).to_have_attribute("aria-label", re.compile(r"^0 slots for the picture, [2-9] for words"))
    page.locator("#prompt textarea").fill("日本語の猫" * 60)
    expect(bar).to_have_attribute("aria-label", re.compile(r", 126 for words, 0 of 126 free"))
    expect(page.locator("#budget del").first).to_be_visible()


def test_a_kept_seed_gives_the_same_picture_and_a_free_one_another(page: Page) -> None:
    page.locator("#prompt textarea").fill("a red boat")
    open_settings(page)
    set_slider(page, "num-images", 1)
    files, address = [], "none"
    for keep in (False, True, False):
        page.get_by_label("Keep this seed").set_checked(keep)
        page.locator("#prompt textarea").press("Control+Enter")
        [address] = wait_drawn(page, 1, old=address)
        files.append(download(page, address))
    assert files[0] == files[1] != files[2]


def test_stop_ends_the_work_within_a_step_and_the_next_request_works(page: Page, server: Server) -> None:
    start_long(page)
    for stop in ("Escape", "button"):
        page.keyboard.press("Escape") if stop == "Escape" else page.get_by_role("button", name="Stop").click()
        expect(page.locator("#status")).to_contain_text("Stopped")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#status")).to_contain_text(re.compile(r"step \d+ of 100"))
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("Stopped")
    expect(page.locator("#status").get_by_text("Error")).not_to_be_visible()
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    set_slider(page, "num-inference-steps", 2)
    set_slider(page, "num-images", 1)
    page.get_by_role("button", name="Generate").click()
    wait_drawn(page, 1)
    assert int(re.findall(r"stopped after step (\d+) of 100", server.log)[-1]) < 90


def test_a_bad_file_gives_its_sentence_and_the_old_result_stays(page: Page, tmp_path: Path) -> None:
    choose(page, CACTUS)
    old = wait_rebuilt(page)
    picture = page.locator("#picture img").get_attribute("src")
    bad = tmp_path / "holiday.png"
    bad.write_bytes(b"this is no picture")
    choose(page, bad)
    expect(page.get_by_text("holiday.png is not a readable picture")).to_be_visible()
    expect(page.get_by_test_id("toast-body")).to_have_count(1)
    assert [page.locator(f"#{rung} img").get_attribute("src") for rung in RUNGS] == old
    expect(page.locator("#picture img")).to_have_attribute("src", picture)
    choose(page, SAILBOAT)
    assert len({*old, *wait_rebuilt(page, old=old[2])}) == 6


def test_an_example_is_rebuilt_too(page: Page) -> None:
    page.locator("#examples .gallery-item").first.click()
    old = wait_rebuilt(page)
    assert len(set(old)) == 3
    page.locator("#examples .gallery-item").nth(1).click()  # in the place of the first: no other card is there
    assert len({*old, *wait_rebuilt(page, old=old[2])}) == 6


def test_an_example_goes_to_the_card_that_is_empty(page: Page) -> None:
    page.locator("#examples .gallery-item").first.click()
    wait_rebuilt(page)
    first = page.locator("#picture img").get_attribute("src")
    page.get_by_role("button", name="Add a picture").click()
    page.locator("#examples .gallery-item").nth(1).press("Enter")
    expect(page.locator("#card-B .picture img").first).to_be_visible()
    expect(page.locator("#picture img")).to_have_attribute("src", first)


def test_nothing_to_do_is_said(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("Give a picture, words, or both")).to_be_visible()
    page.get_by_role("tab", name="Ladder").click()
    page.get_by_role("button", name="Rebuild").click()
    expect(page.get_by_text("Give a picture first")).to_be_visible()


def test_a_double_click_draws_once(page: Page, server: Server) -> None:
    joined = []
    page.on("request", lambda request: joined.append(request.url) if "/queue/join" in request.url else None)
    page.locator("#prompt textarea").fill("a green tree")
    open_settings(page)
    set_slider(page, "num-images", 3)
    page.get_by_role("button", name="Generate").dblclick()
    wait_drawn(page, 3)
    assert len(joined) == 1


def test_two_users_at_once_get_their_own(browser: Browser, server: Server) -> None:
    with browser.new_context() as one, browser.new_context() as two:
        pages = [open_app(context.new_page(), server.url) for context in (one, two)]
        for page, path in zip(pages, (CACTUS, SAILBOAT), strict=True):
            choose(page, path)
        rebuilt = [[download(page, address) for address in wait_rebuilt(page)] for page in pages]
    client = Client(server.url, verbose=False)
    for files, path in zip(rebuilt, (CACTUS, SAILBOAT), strict=True):
        expected = client.predict(picture=handle_file(str(path)), api_name="/reconstruct")[:3]
        assert [pixels(file) for file in files] == [pixels(Path(file).read_bytes()) for file in expected]


def pixels(file: bytes) -> bytes:
    return Image.open(BytesIO(file)).tobytes()


def test_the_api_does_what_the_page_does(server: Server) -> None:
    client = Client(server.url, verbose=False)
    picture = handle_file(str(CACTUS))
    gallery, seed, status = client.predict(
        picture=picture, prompt="a red dog", num_images=2, seed=7, view="raw", api_name="/generate"
    )
    assert seed == 7 and status.startswith("<p>Drawn in")
    assert [item["caption"] for item in gallery] == ["seed 7", "seed 8"]
    assert load_recipe(gallery[1]["image"]).config.seed == 8
    word, code = client.predict(picture=picture, num_tokens=4, api_name="/encode")
    assert len(load_code(word).vilex_tokens) == 4 and code.startswith("vilex-2:")
    gallery, *_ = client.predict(
        picture=picture, picture_2=handle_file(str(SAILBOAT)), name_2="boat", prompt="[A] in a [boat]", num_images=1,
        num_tokens=8, num_tokens_2=4, weight_2=1.5, api_name="/generate",
    )  # fmt: skip
    images = load_recipe(gallery[0]["image"]).images
    assert [(i.name, i.num_tokens, i.weight) for i in images] == [("A", 8, 1), ("boat", 4, 1.5)]
    with pytest.raises(AppError, match="seed must be a whole number, got 1.5"):
        client.predict(picture=picture, seed=1.5, api_name="/reconstruct")
    with pytest.raises(AppError, match="the limit is 1000"):
        client.predict(picture=None, prompt="x" * 10_000, api_name="/generate")


def test_it_fits_a_phone_in_light_and_dark(browser: Browser, server: Server) -> None:
    for theme in ("light", "dark"):
        with browser.new_context(viewport={"width": 390, "height": 844}) as context:
            page = open_app(context.new_page(), f"{server.url}/?__theme={theme}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            results, settings = (page.locator(name).bounding_box()["y"] for name in ("#tabs", "#settings"))
            assert results < settings


def test_nothing_is_fetched_from_elsewhere(browser: Browser, server: Server) -> None:
    addresses = []
    with browser.new_context() as context:
        page = context.new_page()
        page.on("request", lambda request: addresses.append(request.url))
        open_app(page, server.url)
    assert addresses
    assert not [a for a in addresses if not a.startswith((server.url, "data:", "blob:"))]


def test_without_a_choice_the_default_model_draws(browser: Browser, tmp_path: Path) -> None:
    process, url = start_app(tmp_path / "log.txt")
    try:
        wait_until_up(process, url, tmp_path / "log.txt")
        with browser.new_context() as context:
            page = open_app(context.new_page(), url)
            choose(page, CACTUS)
            recipe = load_recipe(download(page, wait_rebuilt(page)[2]))
            assert recipe.model == DEFAULT_MODEL
    finally:
        stop_app(process)


def test_without_weights_the_page_opens_and_says_how_to_get_them(browser: Browser, tmp_path: Path) -> None:
    process, url = start_app(tmp_path / "log.txt", "--model", str(tmp_path / "nowhere"))
    try:
        wait_until_up(process, url, tmp_path / "log.txt")
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(url)
            expect(page.get_by_role("note")).to_contain_text("No weights are loaded. no weights at")
            page.get_by_role("button", name="Generate").click()
            expect(page.get_by_text("no weights at").last).to_be_visible()
    finally:
        stop_app(process)


def test_a_port_in_use_is_one_line_and_exit_code_1(server: Server, tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "app.py"))["main"]
    port = server.url.rsplit(":", 1)[1]
    result = CliRunner().invoke(main, ["--model", str(tmp_path / "nowhere"), "--port", port])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Cannot listen on 127.0.0.1, port {port}")


def test_a_bad_flag_is_one_line_and_exit_code_2() -> None:
    main = runpy.run_path(str(ROOT / "app.py"))["main"]
    result = CliRunner().invoke(main, ["--device", "toaster"])
    assert result.exit_code == 2 and "device 'toaster' is not available here" in result.stderr

"""Picture cards, ladder, history and what survives, in a real browser against the real app."""

import re
from pathlib import Path

from gradio_client import Client, handle_file
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import Server, open_app, unfold
from tests.e2e.test_app import CACTUS, SAILBOAT, choose, download, open_settings, set_slider, wait_drawn, wait_rebuilt
from vilex.recipe import load_recipe

SLOW = 60_000  # milliseconds


def draw_one(page: Page, prompt: str) -> bytes:
    """The PNG of one new picture."""
    pictures = page.locator("#gallery .thumbnail-item img")
    old = pictures.first.get_attribute("src") if pictures.count() else "none"
    page.locator("#prompt textarea").fill(prompt)
    set_slider(page, "num-images", 1)
    page.get_by_role("button", name="Generate").click()
    return download(page, wait_drawn(page, 1, old)[0])


def test_two_named_pictures_share_a_prompt(page: Page) -> None:
    choose(page, CACTUS)
    page.get_by_role("button", name="Add a picture").click()
    page.locator("#card-B input[type=file]").first.set_input_files(SAILBOAT)
    expect(page.locator("#budget .bar")).to_have_attribute("aria-label", re.compile("slots for the pictures"))
    unfold(page, "Adjust picture B")
    page.get_by_label("Name in the prompt").last.fill("boat")
    page.locator("#prompt textarea").fill("[A] in a [boat]")
    expect(page.locator("#budget .reading mark")).to_have_text(["A", "boat"])
    open_settings(page)
    recipe = load_recipe(draw_one(page, "[A] in a [boat]"))
    assert [image.name for image in recipe.images] == ["A", "boat"]
    page.get_by_role("button", name="Remove picture B").click()
    expect(page.locator("#card-B")).not_to_be_visible()
    expect(page.locator("#budget .bar")).to_have_attribute("aria-label", re.compile("slots for the picture,"))


def test_other_budgets_make_other_rungs_and_one_can_be_used(page: Page) -> None:
    choose(page, CACTUS)
    wait_rebuilt(page)
    page.get_by_label("Tokens to rebuild picture A from").fill("2, 30")
    page.get_by_label("Tokens to rebuild picture A from").press("Enter")
    expect(page.locator("#rung-2 img")).to_have_attribute("src", re.compile("vilex-30-tokens"), timeout=SLOW)
    expect(page.locator("#rung-3")).not_to_be_visible()
    page.get_by_role("button", name="Use 30").click()
    expect(page.locator("#budget .bar")).to_have_attribute("aria-label", re.compile("^30 slots"))


def test_bad_budgets_and_names_get_a_sentence(page: Page) -> None:
    choose(page, CACTUS)
    wait_rebuilt(page)
    page.get_by_label("Tokens to rebuild picture A from").fill("1, many")
    page.get_by_role("button", name="Rebuild").click()
    expect(page.get_by_text("Tokens to rebuild from are 1 to 6 whole numbers from 1 to 75")).to_be_visible()
    unfold(page, "Adjust picture A")
    page.get_by_label("Name in the prompt").fill("[dog]")
    expect(page.locator("#budget")).to_contain_text("a picture's name has 1 to 80 characters")


def test_a_bad_file_in_a_card_that_was_emptied_leaves_it_empty(page: Page, tmp_path: Path) -> None:
    bad = tmp_path / "holiday.png"
    bad.write_bytes(b"this is no picture")
    page.get_by_role("button", name="Add a picture").click()
    page.locator("#card-B input[type=file]").first.set_input_files(SAILBOAT)
    expect(page.locator("#budget .bar")).to_have_attribute("aria-label", re.compile("^75 slots"))
    page.get_by_role("button", name="Remove picture B").click()
    expect(page.locator("#card-B")).not_to_be_visible()
    page.get_by_role("button", name="Add a picture").click()
    page.locator("#card-B input[type=file]").first.set_input_files(bad)
    expect(page.get_by_text("holiday.png is not a readable picture")).to_be_visible()
    expect(page.locator("#card-B .picture img")).to_have_count(0)
    expect(page.locator("#budget .bar")).to_have_attribute("aria-label", re.compile("^0 slots"))


def test_a_picked_result_becomes_a_picture(page: Page) -> None:
    draw_one(page, "a red boat")
    page.get_by_role("button", name="Use the picked one as a picture").click()
    expect(page.locator("#status")).to_contain_text("Pick a result first")
    page.locator("#gallery .thumbnail-item").first.click()
    page.get_by_role("button", name="Use the picked one as a picture").click()
    expect(page.locator("#picture img")).to_have_attribute("src", re.compile("vilex-seed-"))
    expect(page.get_by_role("button", name="Bring its settings back")).to_be_visible()
    page.get_by_role("tab", name="History").click()
    page.get_by_role("button", name="Add a picture").click()
    page.locator("#history .thumbnail-item").first.click()
    page.get_by_role("button", name="Use the picked one as a picture").click()
    expect(page.locator("#card-B .picture img").first).to_have_attribute("src", re.compile("vilex-"))


def test_a_picked_result_is_compared_with_its_original(page: Page) -> None:
    choose(page, CACTUS)
    wait_rebuilt(page)
    page.locator("#rung-3 img").click()
    expect(page.locator("#ladder-versus img").first).to_be_visible()
    page.get_by_label("Tokens to rebuild picture A from").fill("1, 2, 3, 4, 5, 6")
    page.get_by_role("button", name="Rebuild").click()
    expect(page.locator("#ladder-versus")).not_to_be_visible()
    expect(page.locator("#status progress")).to_be_visible()  # so the slider went before
    expect(page.locator("#status")).to_contain_text("Rebuilt in", timeout=SLOW)
    open_settings(page)
    draw_one(page, "")
    page.locator("#gallery .thumbnail-item").first.click()
    expect(page.locator("#versus img").first).to_be_visible()


def test_a_result_with_its_tokens_is_all_that_is_needed(page: Page, tmp_path: Path) -> None:
    choose(page, CACTUS)
    open_settings(page)
    page.get_by_label("Put the pictures' tokens into my PNGs").check()
    (tmp_path / "result.png").write_bytes(draw_one(page, "<image>, flat emoji"))
    page.locator("#prompt textarea").fill("something else")
    page.get_by_label("Remove Image").first.click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Open a .vilex or PNG").click()
    chooser.value.set_files(tmp_path / "result.png")
    expect(page.locator("#prompt textarea")).to_have_value("<image>, flat emoji")
    expect(page.locator("#card-A")).to_contain_text("A word of 75 tokens")
    expect(page.get_by_test_id("toast-body")).to_contain_text("The settings are back")
    expect(page.get_by_label("Keep this seed")).to_be_checked()


def test_a_word_dropped_on_the_page_goes_to_an_empty_card(page: Page, server: Server) -> None:
    client = Client(server.url, verbose=False)
    path, _ = client.predict(picture=handle_file(str(CACTUS)), num_tokens=6, api_name="/encode")
    page.evaluate(
        """(bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "cactus.vilex"));
          const zone = document.querySelector("#picture");
          zone.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        list(Path(path).read_bytes()),
    )
    expect(page.locator("#card-A")).to_contain_text("A word of 6 tokens, made from cactus")
    expect(page.locator("#budget .bar")).to_have_attribute("aria-label", re.compile("^6 slots"))
    expect(page.locator("#rung-2 img")).to_have_attribute("src", re.compile("vilex-6-tokens"))  # its ladder is drawn
    expect(page.get_by_text("This card holds a word").first).to_be_visible()


def test_a_refresh_loses_nothing(page: Page) -> None:
    choose(page, CACTUS)
    wait_rebuilt(page)
    open_settings(page)
    draw_one(page, "<image> by day")
    before = page.evaluate("localStorage['vilex-page'].length")
    draw_one(page, "<image> at night")
    address = page.locator("#gallery .thumbnail-item img").first.get_attribute("src")
    # the memory, which is encrypted, has the gallery's picture in it and not the prompt alone
    page.wait_for_function("(before) => localStorage['vilex-page'].length > before + 300", arg=before)
    page.reload()
    expect(page.locator("#prompt textarea")).to_have_value("<image> at night")
    expect(page.locator("#picture img").first).to_be_visible()
    page.get_by_role("tab", name="Pictures").click()
    restored = page.locator("#gallery .thumbnail-item img").first
    expect(restored).to_have_attribute("src", re.compile(re.escape(address.rsplit("/", 1)[1])))
    page.get_by_role("tab", name="History").click()
    page.locator("#history .thumbnail-item").first.click()
    page.locator("#prompt textarea").fill("")
    page.get_by_role("button", name="Bring back the settings").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("The settings are back")


def test_an_address_of_this_machine_is_refused(page: Page) -> None:
    unfold(page, "Adjust picture A")
    source = page.locator("#source-A").get_by_role("textbox")
    source.fill("http://127.0.0.1:1/a.png")
    source.press("Enter")
    expect(page.get_by_text("'127.0.0.1' is not a host that can be reached from here")).to_be_visible()


def test_every_tab_opens(page: Page) -> None:
    for name in ("Pictures", "Blend", "Balance", "Inspect", "Compare", "History", "About", "Ladder"):
        page.get_by_role("tab", name=name).click()
        expect(page.get_by_role("tabpanel").filter(visible=True)).to_have_count(1)


def test_every_page_theme_and_width_fits(browser: Browser, server: Server) -> None:
    for theme in ("light", "dark"):
        for width in (1440, 1024, 390):
            with browser.new_context(viewport={"width": width, "height": 900}) as context:
                page = open_app(context.new_page(), f"{server.url}/?__theme={theme}")
                assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_link_brings_the_page_back_and_no_server_sees_it(browser: Browser, page: Page, server: Server) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    choose(page, CACTUS)
    open_settings(page)
    set_slider(page, "num-images", 1)
    page.get_by_label("Keep this seed").check()
    page.locator("#prompt textarea").fill("<image>, at <night>")
    unfold(page, "Link to this page")
    page.get_by_role("button", name="Copy a link to this page").click()
    note = re.compile(r"[56]\d of 75 tokens of A.*It is copied")
    expect(page.locator("#link-note")).to_contain_text(note, timeout=SLOW)
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{server.url}/#vilex=") and 30_000 < len(link) < 32_000
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        other = open_app(context.new_page(), link)
        expect(other.locator("#prompt textarea")).to_have_value("<image>, at <night>")
        expect(other.locator("#card-A")).to_contain_text(re.compile(r"A word of \d+ tokens"))
        expect(other).to_have_url(f"{server.url}/")  # a refresh must not undo what comes next
        assert asked and not [url for url in asked if "vilex=" in url]
        other.get_by_role("button", name="Generate").click()
        recipe = load_recipe(download(other, wait_drawn(other, 1)[0]))
        assert recipe.prompt == "<image>, at <night>" and recipe.config.num_inference_steps == 3
    assert "vilex=" not in server.log


def test_a_damaged_link_gives_a_sentence_and_the_page_works(page: Page, server: Server) -> None:
    page.goto(f"{server.url}/#vilex=damaged")
    damaged = "This link cannot be opened: the link is damaged"
    expect(page.get_by_test_id("toast-body")).to_contain_text(damaged, timeout=SLOW)
    expect(page.get_by_test_id("toast-body")).to_have_count(1)
    open_settings(page)
    assert load_recipe(draw_one(page, "a red boat")).prompt == "a red boat"


def test_pictures_are_sorted_by_likeness_to_picture_a(page: Page, tmp_path: Path) -> None:
    choose(page, CACTUS)
    wait_rebuilt(page)
    expect(page.locator("#status")).to_contain_text("Rebuilt in")
    (tmp_path / "twin.png").write_bytes(CACTUS.read_bytes())
    page.get_by_role("tab", name="History").click()
    page.get_by_role("button", name="Which pictures are most like picture A?").click()
    page.locator("#similar-files input[type=file]").set_input_files([tmp_path / "twin.png", SAILBOAT])
    page.get_by_label("Results of this page").uncheck()
    page.get_by_role("button", name="Sort by likeness").click()
    captions = page.locator("#alike .caption-label")
    expect(captions).to_have_count(10, timeout=SLOW)
    expect(captions.first).to_have_text(re.compile(r"1.00 · (twin|cactus)"))
    expect(page.locator("#status")).to_contain_text("Compared 10")

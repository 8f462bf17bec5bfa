"""Polish in a real browser: a picture ends as a word in its card, and Stop ends it."""

from playwright.sync_api import Page, expect

from tests.e2e.test_app import CACTUS, choose, set_slider, wait_drawn, wait_rebuilt

SLOW = 60_000  # milliseconds


def test_a_polished_picture_is_a_word_in_its_card(page: Page) -> None:
    choose(page, CACTUS)
    wait_rebuilt(page)
    page.get_by_role("button", name="Keep picture A as a word").click()
    set_slider(page, "polish-steps", 200)
    page.get_by_role("button", name="Polish picture A").click()
    expect(page.locator("#status")).to_contain_text("Polishing · step", timeout=SLOW)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped.")
    set_slider(page, "polish-steps", 2)
    page.get_by_role("button", name="Polish picture A").click()
    expect(page.locator("#status")).to_contain_text("Polished in", timeout=SLOW)
    expect(page.get_by_text("A word of 75 tokens, made from cactus.")).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="Generate").click()
    wait_drawn(page, 4)

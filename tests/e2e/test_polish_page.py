"""Polish in a real browser: a picture gets a word beside it in its card, and Stop ends it."""

from playwright.sync_api import Page, expect

from tests.e2e.conftest import unfold
from tests.e2e.test_app import CACTUS, choose, set_slider, wait_drawn, wait_rebuilt

SLOW = 60_000  # milliseconds


def test_a_polished_picture_stays_in_its_card_and_is_drawn_from_its_word(page: Page) -> None:
    choose(page, CACTUS)
    wait_rebuilt(page)
    unfold(page, "Keep picture A as a word")
    set_slider(page, "polish-steps", 200)
    page.get_by_role("button", name="Polish picture A").click()
    expect(page.locator("#status")).to_contain_text("Polishing · step", timeout=SLOW)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped.")
    set_slider(page, "polish-steps", 2)
    page.get_by_role("button", name="Polish picture A").click()
    expect(page.get_by_text("Polished: 75 tokens fitted to this picture.")).to_be_visible(timeout=SLOW)
    expect(page.locator("#picture img")).to_be_visible()
    page.get_by_role("button", name="Generate").click()
    wait_drawn(page, 4)

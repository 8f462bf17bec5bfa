"""Blend, Balance, Inspect, Compare and About, used in a real browser against the real app."""

import csv
import re
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import Server, unfold
from tests.e2e.test_app import CACTUS, SAILBOAT, choose, download, set_slider, wait_rebuilt
from vilex.recipe import load_recipe


@pytest.fixture
def cactus(page: Page) -> Page:
    """The page once picture A has come in and is rebuilt, so that nothing else draws."""
    choose(page, CACTUS)
    wait_rebuilt(page)
    return page


@pytest.fixture
def both(cactus: Page) -> Page:
    """The same with a sailboat as picture B."""
    cactus.get_by_role("button", name="Add a picture").click()
    cactus.locator("#card-B input[type=file]").first.set_input_files(SAILBOAT)
    expect(cactus.locator("#budget .bar")).to_have_attribute("aria-label", re.compile("slots for the pictures"))
    return cactus


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def set_number(page: Page, label: str, value: int) -> None:
    """Writes a slider's number, as a user would beside it."""
    box = page.get_by_label(f"number input for {label}", exact=True)
    box.fill(str(value))
    box.press("Tab")


def thumbnails(page: Page, gallery: str, count: int, kind: str) -> Locator:
    """The finished pictures of a gallery, whose files are called after their kind."""
    found = page.locator(f"#{gallery} .thumbnail-item img[src*='{kind}']")
    expect(found).to_have_count(count)
    return found


def captions(page: Page, gallery: str) -> list[str]:
    return page.locator(f"#{gallery} .thumbnail-item .caption-label").all_inner_texts()


def test_a_row_leads_from_one_picture_to_the_other_and_one_of_it_is_used(both: Page) -> None:
    open_tab(both, "Blend")
    set_number(both, "Pictures in the row", 3)
    press(both, "Blend")
    pictures = thumbnails(both, "blends", 3, "vilex-blending-")
    assert captions(both, "blends") == ["0% B", "50% B", "100% B"]
    files = [download(both, picture.get_attribute("src")) for picture in pictures.all()]
    assert len(set(files)) == 3 and all(load_recipe(file).images for file in files)
    pictures.nth(1).click()
    press(both, "Use as a picture")
    expect(both.locator("#card-C")).to_contain_text("A word of 75 tokens, made from blend")


def test_content_of_one_picture_gets_the_look_of_the_other(both: Page) -> None:
    open_tab(both, "Blend")
    unfold(both, "Content of one, look of the other")
    press(both, "Graft")
    thumbnails(both, "blends", 4, "vilex-grafting-")
    assert captions(both, "blends") == [f"{cut} of A, then B" for cut in (1, 4, 16, 40)]


def test_blending_with_a_picture_that_is_not_there_is_told(cactus: Page) -> None:
    open_tab(cactus, "Blend")
    press(cactus, "Use as a picture")
    expect(cactus.get_by_text("Choose one of the pictures first: click it")).to_be_visible()
    press(cactus, "Blend")
    expect(cactus.get_by_text("Picture B is empty: give it a picture first")).to_be_visible()


def test_a_cut_that_cannot_be_is_told_to_other_programs(server: Server) -> None:
    client = Client(server.url, verbose=False)
    pictures = {"picture": handle_file(str(CACTUS)), "picture_2": handle_file(str(SAILBOAT))}
    with pytest.raises(AppError, match="cut must be between 0 and 75, got 99"):
        client.predict(**pictures, first="A", second="B", cut=99, row=False, api_name="/graft")


def test_a_click_on_the_map_takes_tokens_and_guidance_over(cactus: Page) -> None:
    cactus.locator("#prompt textarea").fill("<image>, flat emoji")
    open_tab(cactus, "Balance")
    press(cactus, "Draw the map")
    expect(cactus.locator("#status")).to_contain_text("Click a picture to take its settings")
    expect(cactus.locator("#balance .thumbnail-item")).to_have_count(16)
    assert captions(cactus, "balance")[9] == "4 tokens, TFG 3"
    cactus.locator("#balance .thumbnail-item").nth(9).click()
    expect(cactus.locator("#status")).to_contain_text("Now at 4 tokens, TFG 3.")
    expect(cactus.locator("#budget .bar")).to_have_attribute("aria-label", re.compile("^4 slots for the picture,"))
    expect(cactus.locator("#tfg-scale input[type=number]")).to_have_value("3")


def test_a_map_without_words_is_told(cactus: Page) -> None:
    open_tab(cactus, "Balance")
    press(cactus, "Draw the map")
    expect(cactus.get_by_text("The map needs a picture and words in the prompt")).to_be_visible()


def test_tokens_are_read_shown_on_the_picture_and_left_out(cactus: Page) -> None:
    open_tab(cactus, "Inspect")
    press(cactus, "Inspect")
    expect(cactus.locator("#nearest tbody tr")).to_have_count(75)
    expect(cactus.locator("#nearest tbody tr").first).to_contain_text(re.compile(r"^1\S+ -?[01]\.\d\d"))
    overlay = cactus.get_by_role("img", name="The picture, coloured by where the token looked")
    expect(overlay).to_be_visible()
    mean = overlay.get_attribute("src")
    expect(cactus.get_by_text("The mean token looked most where it is yellow")).to_be_visible()
    set_number(cactus, "Token", 2)
    expect(cactus.get_by_text("Token 2 looked most where it is yellow")).to_be_visible()
    expect(overlay).not_to_have_attribute("src", mean)
    press(cactus, "Draw without this token")
    thumbnails(cactus, "left-out", 2, "vilex-")
    assert captions(cactus, "left-out") == ["all 75 tokens", "without token 2"]
    expect(cactus.locator("#status")).to_contain_text(re.compile(r"The two are \d+ % alike"))


def test_votes_of_a_blind_pair_are_counted_and_downloaded(cactus: Page, tmp_path: Path) -> None:
    open_tab(cactus, "Compare")
    press(cactus, "Vote")
    expect(cactus.get_by_text("Draw a pair first: each can be voted on once")).to_be_visible()
    press(cactus, "Draw a pair")
    expect(cactus.locator("#status")).to_contain_text("Which of the two is closer to the input?")
    for side in ("Input", "Left", "Right"):
        expect(cactus.get_by_role("img", name=f"{side} picture of the comparison")).to_be_visible()
    answers = {"semantics": "left", "style": "right", "layout": "equal"}
    for question, answer in answers.items():
        cactus.locator(f"#vote-{question}").get_by_label(answer, exact=True).check()
    press(cactus, "Vote")
    expect(cactus.locator("#verdict")).to_contain_text(re.compile("Left was .* tokens?, right was .* tokens?;"))
    expect(cactus.get_by_role("region", name="Votes so far").locator("tbody tr")).to_have_count(3)
    unfold(cactus, "Votes as a table (CSV)")
    with cactus.expect_download() as saved:
        press(cactus, "Download the votes")
    saved.value.save_as(tmp_path / "votes.csv")
    with (tmp_path / "votes.csv").open(newline="") as file:
        votes = {row["question"]: row for row in csv.DictReader(file)}
    assert {question: row["answer"] for question, row in votes.items()} == answers
    assert votes["semantics"]["closer"] == votes["semantics"]["left"] != votes["style"]["closer"]
    cactus.reload()
    cactus.locator("#budget .bar").wait_for()
    open_tab(cactus, "Compare")
    expect(cactus.get_by_role("region", name="Votes so far").locator("tbody tr")).to_have_count(3)
    unfold(cactus, "Votes as a table (CSV)")
    expect(cactus.locator("#votes textarea")).to_have_value(re.compile("^time,model,.*semantics,left", re.DOTALL))
    press(cactus, "Forget the votes")
    expect(cactus.get_by_role("region", name="Votes so far")).not_to_be_visible()
    expect(cactus.locator("#votes textarea")).to_have_value("")


def test_licence_and_limits_of_the_weights_are_on_the_page(page: Page) -> None:
    expect(page.locator("#small-print")).to_contain_text("non-commercial research")
    open_tab(page, "About")
    expect(page.get_by_role("region", name="The weights in use").get_by_text("non-commercial-research")).to_be_visible()
    expect(page.get_by_role("heading", name="What it cannot do")).to_be_visible()
    expect(page.locator("#limits li").first).to_contain_text("hints, not facts")
    unfold(page, "Licences")
    expect(page.locator("#licences")).to_contain_text("Apache License 2.0")


def test_a_preset_turns_the_settings(page: Page) -> None:
    unfold(page, "Settings")
    page.locator("#preset input").click()
    page.get_by_role("option", name="Careful").click()
    for name, value in (("num-images", "2"), ("num-inference-steps", "30"), ("guidance-scale", "1.5")):
        expect(page.locator(f"#{name} input[type=number]")).to_have_value(value)
    expect(page.locator("#preset input")).to_have_value("Careful")
    set_slider(page, "num-inference-steps", 25)
    expect(page.locator("#preset input")).to_have_value("As they are")

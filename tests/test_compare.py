"""The tab Compare: the order stays hidden until the vote, and a vote says exactly what was chosen."""

import csv
import io
import json
import re
from collections import Counter

import gradio as gr
import pytest
from PIL import Image

from app.cards import pack
from app.compare import ANSWERS, QUESTIONS, WORDS, Compare, Trial, cast, show_votes, shuffle, tally, to_csv
from vilex.codes import VilexCode
from vilex.config import GenerationConfig
from vilex.recipe import load_recipe

pytest_plugins = ["tabs"]
PAIR = {"card": "A", "first": "1 token", "second": "16 tokens", "prompt": "", "view": "raw"}
TRIAL = Trial("1 token", WORDS, 7, "0123456789ab")


@pytest.fixture
def tab(handlers) -> Compare:
    return Compare(handlers)


def draw(tab, cards, **changes):
    return list(tab.draw(**PAIR | cards | changes))


def test_a_pair_is_drawn_from_one_noise_and_its_trial_says_which_is_which(tab, cards, picture):
    updates = draw(tab, cards)
    _, left, right, trial, _, status = updates[-1]
    assert updates[0][0].size == (256, 256) and {trial.left, trial.right} == {"1 token", "16 tokens"}
    assert trial.fingerprint == tab.handlers.pipeline.fingerprint
    for arm, image in ((trial.left, left), (trial.right, right)):
        config = GenerationConfig(seed=trial.seed, num_inference_steps=3, num_tokens=int(arm.split()[0]))
        drawn = tab.handlers.pipeline.generate("", [picture], config).images[0]
        assert max(abs(a - b) for a, b in zip(image.tobytes(), drawn.tobytes(), strict=True)) <= 2


def test_nothing_on_the_page_tells_the_arms(tab, cards):
    updates = draw(tab, cards, first=WORDS, prompt="[A] a red dog")
    shown = " ".join(str(value) for update in updates for value in update if isinstance(value, str))
    assert not re.search(r"token|words|seed", shown)
    trials = [update[3] for update in updates]
    assert isinstance(trials[-1], Trial) and trials[0] is None and all(trial == gr.skip() for trial in trials[1:-1])
    left, right = updates[-1][1:3]
    assert isinstance(left, Image.Image) and load_recipe(left) is None and not left.info and not right.info


def test_words_alone_are_the_prompt_without_its_pictures(tab, cards):
    _, left, right, trial, *_ = draw(tab, cards, first=WORDS, prompt="[A] a red dog <image:2>")[-1]
    config = GenerationConfig(seed=trial.seed, num_inference_steps=3)
    drawn = tab.handlers.pipeline.generate("a red dog", [], config).images[0]
    image = left if trial.left == WORDS else right
    assert max(abs(a - b) for a, b in zip(image.tobytes(), drawn.tobytes(), strict=True)) <= 2


def test_either_order_comes():
    sides = Counter(shuffle("a", "b", 5, "f").left for _ in range(200))
    assert min(sides["a"], sides["b"]) > 50 and len(sides) == 2


def test_a_vote_reveals_the_order_and_can_be_cast_once(tab):
    votes, trial, verdict, *answers = tab.vote(TRIAL, [], "left", "right", "equal")
    table, text = show_votes(votes)
    assert len(votes) == 3 and all(f"<td>{count}</td>" in table for count in (0, 1))
    assert trial is None and answers == [None] * 3 and "Left was 1 token, right was words alone" in verdict
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["time", "model", "left", "right", "seed", "question", "answer", "closer"]
    assert [(row["question"], row["answer"], row["closer"]) for row in rows] == [
        ("semantics", "left", "1 token"), ("style", "right", WORDS), ("layout", "equal", "equal"),
    ]  # fmt: skip
    assert {(row["model"], row["seed"]) for row in rows} == {("0123456789ab", "7")}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["time"]) for row in rows)
    with pytest.raises(gr.Error, match="Draw a pair first"):
        tab.vote(trial, votes, "left", "left", "left")


def test_votes_add_up_whatever_side_an_arm_stood_on():
    turned = Trial(TRIAL.right, TRIAL.left, 8, TRIAL.fingerprint)
    votes = cast(TRIAL, dict.fromkeys(QUESTIONS, "left")) + cast(turned, dict.fromkeys(QUESTIONS, "right"))
    html = tally(votes)
    assert html.count("<td>2</td><td>0</td><td>0</td>") == 3 and tally(()) == ""
    assert len(to_csv(votes).splitlines()) == 1 + 2 * len(QUESTIONS)


def test_votes_that_a_browser_kept_count_on_and_what_is_none_is_left_out(tab):
    kept, *_ = tab.vote(TRIAL, [], "left", "left", "left")
    bad = [3, {}, kept[0] | {"seed": "7"}, kept[0] | {"answer": "up"}, kept[0] | {"extra": 1}]
    votes, *_ = tab.vote(TRIAL, [*bad, *json.loads(json.dumps(kept))], "right", "right", "right")
    assert votes[:3] == kept and [vote["closer"] for vote in votes[3:]] == [WORDS] * 3


@pytest.mark.parametrize("saved", [None, "votes", {"left": 1}, []])
def test_without_votes_there_is_no_table(saved):
    assert show_votes(saved) == ("", "")


def test_a_question_left_out_is_said(tab):
    with pytest.raises(gr.Error, match="Answer all of the questions first"):
        tab.vote(TRIAL, [], "left", None, "equal")


@pytest.mark.parametrize("answer", ["", "both", 1])
def test_every_question_needs_one_of_the_answers(tab, answer):
    with pytest.raises(gr.Error, match=f"The answer on style must be one of {', '.join(ANSWERS)}, got {answer!r}"):
        tab.vote(TRIAL, [], "left", answer, "equal")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second": "1 token"}, "two arms must differ, got '1 token' twice"),
        (
            {"first": "3 tokens"},
            "arm must be one of words alone, 1 token, 4 tokens, 16 tokens, 75 tokens, got '3 tokens'",
        ),
        ({"first": WORDS, "prompt": "[A] <image>"}, "The arm 'words alone' needs words in the prompt"),
        ({"first": WORDS, "prompt": None}, "The prompt must be text, got NoneType"),
        ({"card": "C"}, "Picture C is empty"),
        ({"view": "x"}, "view must be one of enlarged, raw, got 'x'"),
    ],
)
def test_bad_input_gets_one_sentence(tab, cards, changes, message):
    with pytest.raises(gr.Error) as caught:
        draw(tab, cards, **changes)
    assert message in caught.value.message


def test_a_code_has_nothing_to_compare_with(tab, pipeline):
    import torch

    word = {"word": pack(VilexCode(torch.ones(2, 8), pipeline.fingerprint))}
    with pytest.raises(gr.Error, match="Picture A came as a code"):
        draw(tab, word)

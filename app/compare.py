"""The tab Compare: which of two pictures is closer to the input, asked without saying what made them.

The questions are those of the paper's human study. Votes live in the browser and in the text that the user
downloads, nowhere else.
"""

import csv
import dataclasses
import io
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import gradio as gr
from torch import Tensor

from app import table
from app.cards import names_of, take_cards
from app.handlers import VIEWS, Handlers, check_choice, text_of
from app.messages import Clock, finished, in_words
from app.studio import SAMPLING, Studio
from app.workbench import card_choice, read_one, read_settings
from vilex.config import GenerationConfig, token_budgets, tokens_in_words
from vilex.images import fit_image
from vilex.prompt import words_of
from vilex.sampling import Conditions

WORDS = "words alone"
QUESTIONS = {
    "semantics": "Which is closer in what it shows?",
    "style": "Which is closer in style?",
    "layout": "Which is closer in layout?",
}
ANSWERS = ("left", "right", "equal")
STORAGE_KEY, SECRET = "vilex-votes-", "vilex"  # fixed, or a restart of the app would forget everybody's votes
_SEEN_SIZE = 256  # pixels of the input's side
_TYPES = {"seed": int}  # of a vote's fields; the others are text
_SEEDS = 10**6
_DOWNLOAD = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  link.download = "vilex-votes.csv";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


@dataclasses.dataclass(frozen=True)
class Trial:
    """Two arms as they stand on the page, and what they have in common; the page keeps the arms to itself."""

    left: str
    right: str
    seed: int
    fingerprint: str

    def chosen(self, answer: str) -> str:
        """The arm that an answer means, "equal" for neither."""
        return {"left": self.left, "right": self.right}.get(answer, answer)


@dataclasses.dataclass(frozen=True)
class Vote:
    """One row of the downloaded table; `time` is UTC, `answer` left, right or equal, `closer` the arm it means."""

    time: str
    model: str
    left: str
    right: str
    seed: int
    question: str
    answer: str
    closer: str


def shuffle(first: str, second: str, seed: int, fingerprint: str) -> Trial:
    """The arms in an order that nobody can tell beforehand, whatever the seed of the pictures.

    Raises ValueError when both arms are the same.
    """
    if first == second:
        raise ValueError(f"The two arms must differ, got {first!r} twice")
    left, right = random.SystemRandom().sample([first, second], 2)
    return Trial(left, right, seed, fingerprint)


def cast(trial: Trial | None, answers: Mapping[str, object]) -> list[Vote]:
    """A vote per question. Raises ValueError without a pair, and for a question that is not answered."""
    if trial is None:
        raise ValueError("Draw a pair first: each can be voted on once")
    if None in answers.values():
        raise ValueError("Answer all of the questions first")
    for question, answer in answers.items():
        if answer not in ANSWERS:
            raise ValueError(f"The answer on {question} must be one of {', '.join(ANSWERS)}, got {answer!r}")
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return [
        Vote(time, trial.fingerprint, trial.left, trial.right, trial.seed, question, answer, trial.chosen(answer))
        for question, answer in answers.items()
    ]


def recall(saved: object) -> list[Vote]:
    """The votes among what a browser kept, which may be anything."""
    items = saved if isinstance(saved, list) else []
    return [Vote(**item) for item in items if isinstance(item, dict) and _is_vote(item)]


def _is_vote(item: Mapping[str, object]) -> bool:
    types = {field.name: _TYPES.get(field.name, str) for field in dataclasses.fields(Vote)}
    fits = item.keys() == types.keys() and all(type(item[name]) is kind for name, kind in types.items())
    return fits and item["question"] in QUESTIONS and item["answer"] in ANSWERS


def to_csv(votes: Sequence[Vote]) -> str:
    """The votes as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Vote)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, votes))
    return text.getvalue()


def tally(votes: Sequence[Vote]) -> str:
    """How often each arm won, by question, as an HTML table; empty without votes."""
    if not votes:
        return ""
    counts = Counter((vote.question, vote.closer) for vote in votes)
    arms = [*sorted({arm for vote in votes for arm in (vote.left, vote.right)}), "equal"]
    rows = [[text, *(counts[question, arm] for arm in arms)] for question, text in QUESTIONS.items()]
    return table.to_html("Votes so far", ["Question", *arms], rows)


def show_votes(saved: object) -> tuple[str, str]:
    """The tally and the CSV of what a browser kept, both empty without votes."""
    votes = recall(saved)
    return tally(votes), to_csv(votes) if votes else ""


def reveal(trial: Trial) -> str:
    """Which arm stood where, in one sentence."""
    return f"Left was {trial.left}, right was {trial.right}; both with seed {trial.seed}."


@dataclasses.dataclass(frozen=True)
class Compare:
    """The tab's functions."""

    handlers: Handlers

    @property
    def arms(self) -> dict[str, int | None]:
        """What can be compared: the words alone, or a count of the picture's tokens."""
        budgets = token_budgets(self.handlers.max_tokens)
        return {WORDS: None} | {tokens_in_words(budget): budget for budget in budgets}

    def draw(self, card: str, first: str, second: str, prompt: str, view: str, **values: Any) -> Iterator[tuple]:
        """Two pictures from one noise, with a seed of their own, in an order that the page does not tell.

        Gives the input, left, right, the trial (None until both are there), an empty verdict and a status line.
        """
        with in_words():
            pipeline = self.handlers.ready()
            for arm in (first, second):
                check_choice(arm, self.arms, "arm")
            check_choice(view, VIEWS, "view")
            seed = random.SystemRandom().randrange(_SEEDS)
            config = dataclasses.replace(read_settings(values), seed=seed)
            trial = shuffle(first, second, seed, pipeline.fingerprint)
            word = read_one(self.handlers, values, card, full=True)
            if word.image is None:
                raise ValueError(f"Picture {card} came as a code: there is nothing to compare the two with")
            words = _words_of(prompt, values) if WORDS in (first, second) else ""
            conditions = [self._conditions(arm, words, word.vilex_tokens, config) for arm in (trial.left, trial.right)]
            yield fit_image(word.image, _SEEN_SIZE, word.fit), None, None, None, "", gr.skip()
            pair, clock = [gr.skip()] * 2, Clock(2 * config.num_inference_steps)
            for side, condition in enumerate(conditions):
                for images, status in self.handlers.watch(condition, config, [seed], clock, f"Drawing {ANSWERS[side]}"):
                    if images is not None:
                        pair[side] = images[0]
                    yield gr.skip(), *pair, gr.skip(), gr.skip(), status
                pair[side] = self.handlers.at_size(images[0], view)
            yield gr.skip(), *pair, trial, "", finished("Which of the two is closer to the input?")

    def vote(self, trial: Trial | None, saved: object, *answers: object) -> tuple:
        """Adds an answer per question; gives the votes, no trial, the verdict and emptied answers."""
        with in_words():
            votes = [*recall(saved), *cast(trial, dict(zip(QUESTIONS, answers, strict=True)))]
        emptied = [None] * len(QUESTIONS)
        return list(map(dataclasses.asdict, votes)), None, finished(reveal(trial)), *emptied

    def _conditions(self, arm: str, words: str, tokens: Tensor, config: GenerationConfig) -> Conditions:
        pictures = [] if arm == WORDS else [tokens[: self.arms[arm]]]
        return self.handlers.ready().conditions("" if pictures else words, pictures, config)


def _words_of(prompt: str, values: Mapping[str, Any]) -> str:
    """The prompt without its pictures. Raises ValueError when nothing is left."""
    cards = take_cards(dict(values))
    words = words_of(text_of(prompt), len(cards), names_of(cards))
    if not words:
        raise ValueError(f"The arm {WORDS!r} needs words in the prompt")
    return words


def build_compare(studio: Studio) -> None:
    """Lays out the tab and wires it."""
    tab = Compare(studio.handlers)
    names, own = list(tab.arms), studio.handlers.pipeline.name if studio.handlers.pipeline else ""
    gr.Markdown(
        "Two pictures from one noise, in an order that stays hidden until you have voted. The votes are kept in your "
        "browser alone, those on each model by themselves."
    )
    with gr.Row():
        card = card_choice("Input")
        first = gr.Dropdown(names, value=names[1], label="One arm", filterable=False, min_width=140)
        second = gr.Dropdown(names, value=names[-1], label="Other arm", filterable=False, min_width=140)
    draw = gr.Button("Draw a pair", variant="primary", elem_id="pair")
    with gr.Row(elem_id="blind"):
        seen, left, right = (_picture(label) for label in ("Input", "Left", "Right"))
    trial, votes = gr.State(None), gr.BrowserState([], storage_key=STORAGE_KEY + own, secret=SECRET)
    with gr.Row():
        answers = [
            gr.Radio(ANSWERS, label=question, min_width=200, elem_id=f"vote-{name}")
            for name, question in QUESTIONS.items()
        ]
    vote = gr.Button("Vote", elem_id="vote")
    verdict, counts = gr.HTML("", label="What was what", elem_id="verdict"), gr.HTML("", label="Votes so far")
    with gr.Accordion("Votes as a table (CSV)", open=False):
        text = gr.Textbox(
            "", label="Votes", lines=4, max_lines=12, interactive=False, buttons=["copy"], elem_id="votes"
        )
        with gr.Row():
            download = gr.Button("Download the votes", min_width=140)
            forget = gr.Button("Forget the votes", min_width=140)
    inputs = studio.inputs("cards", "prompt", "view", *SAMPLING) | {"card": card, "first": first, "second": second}
    outputs = [seen, left, right, trial, verdict, studio.status]
    studio.compute(draw.click, tab.draw, outputs, inputs, api_visibility="private")
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    # queued, since only queued events show their errors
    voted = vote.click(tab.vote, [trial, votes, *answers], [votes, trial, verdict, *answers], **quiet)
    studio.say(voted, "The vote is counted.")
    forget.click(list, None, votes, **quiet)
    gr.on(None, show_votes, votes, [counts, text], **quiet)  # at the page's start and after each change
    download.click(None, text, None, js=_DOWNLOAD, api_visibility="private")


def _picture(label: str) -> gr.Image:
    return gr.Image(
        label=label, format="png", interactive=False, min_width=90, buttons=["fullscreen"],
        elem_id=f"blind-{label.lower()}", alt_text=f"{label} picture of the comparison",
    )  # fmt: skip

"""What happens behind the app's buttons: check the input, call the pipeline, put errors into words.

Every long handler is a generator over the engine's steps,
so closing it stops the work within one step. Nothing here remembers a user: each request carries all it needs.
"""

import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from app import budget
from app.cards import PictureWord, Upload, names_of, open_upload, read_card, take_cards
from app.engine import Engine, Waiting
from app.messages import Clock, duration, finished, in_words, waiting
from vilex.codes import load_code, save_code, to_text
from vilex.config import DEFAULT_TOKENS, MAX_PROMPT_CHARS, MIXING, GenerationConfig
from vilex.images import fit_image
from vilex.pipeline import VilexPipeline
from vilex.prompt import has_words, mentioned
from vilex.recipe import Recipe, build_recipe, build_recipe_image, save_png
from vilex.sampling import Conditions, Step
from vilex.upsampler import SMALL_SIDE, Upsampler

MAX_COPIED = 4  # tokens; a code of more is too long to copy by hand
VIEWS = ("enlarged", "raw")
PREVIEWS = 6  # pictures shown on the way to each result, beside the first
_TFG_INFO = "1 is the plain mixture, more is for the words, 0 leaves it out"
_WORDS_INFO = "Adds what the words alone ask for: 0 nothing, at 4 to 6 styles show, above less of the picture is left"
NO_WORDS, NO_PICTURE = "Has no effect: the prompt has no words", "Has no effect without a picture and words"
_PREVIEW_SIZE = 64  # pixels, where no encoder says how many it reads
_log = logging.getLogger(__name__)

Watched = Iterator[tuple[list[Image.Image] | None, str]]


@dataclasses.dataclass(frozen=True)
class Look:
    """How results are saved: enlarged or raw, and with the pictures' tokens in them or not. Raises ValueError."""

    view: str
    embed: bool

    def __post_init__(self) -> None:
        check_choice(self.view, VIEWS, "view")
        check_choice(self.embed, (False, True), "embed")


@dataclasses.dataclass(frozen=True)
class Handlers:
    """The app's functions over one pipeline; without one `problem` says what is missing.

    folder: of the weights; engine: draws for all users, one of its own by default.
    """

    pipeline: VilexPipeline | None
    upsampler: Upsampler | None = None
    problem: str = ""
    folder: Path | None = None
    engine: Engine | None = None

    def __post_init__(self) -> None:
        if self.pipeline is not None and self.engine is None:
            object.__setattr__(self, "engine", Engine(self.pipeline))

    @property
    def max_tokens(self) -> int:
        """The most tokens of a picture."""
        return self.pipeline.max_tokens if self.pipeline else DEFAULT_TOKENS

    def ready(self) -> VilexPipeline:
        """The pipeline. Raises ValueError, with the command that gets them, when there are no weights."""
        if self.pipeline is None:
            raise ValueError(self.problem)
        return self.pipeline

    def read_cards(self, values: dict[str, Any], full: bool = False) -> list[PictureWord]:
        """The cards in use as words, their fields taken out of `values`; `full` gives all the tokens there are.

        Raises ValueError with one sentence for whatever is wrong with a card.
        """
        return [read_card(self.ready(), card, full) for card in take_cards(values)]

    def look(self, picture: Upload, fit: str) -> Image.Image | None:
        """What the encoder sees of a picture; None without one."""
        with in_words():
            return None if picture is None else self.seen(open_upload(picture), fit)

    def seen(self, image: Image.Image, fit: str) -> Image.Image:
        """A picture as the encoder sees it."""
        size = self.pipeline.seen_size if self.pipeline else _PREVIEW_SIZE
        return fit_image(image, size, fit)

    def plan(self, prompt: str, **values: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """The budget bar, and the two sliders that weigh words, with the reason when they have no effect."""
        if self.pipeline is None:
            return finished("The slots appear here once there are weights."), gr.skip(), gr.skip()
        try:
            cards = take_cards(values)
            bar = budget.to_html(budget.spend(self.pipeline, text_of(prompt), cards))
            works = bool(cards) and has_words(prompt, len(cards), names_of(cards))
        except ValueError as error:
            return budget.note_html(str(error)), gr.skip(), gr.skip()
        infos = (_TFG_INFO, _WORDS_INFO) if works else (NO_WORDS if cards else NO_PICTURE,) * 2
        return bar, *(gr.update(interactive=works, info=info) for info in infos)

    def generate(self, prompt: str, view: str, embed: bool = False, **values: Any) -> Iterator[tuple]:
        """Variations of a picture, mixes of pictures with words, or pictures of words alone.

        In the prompt <image> stands for the picture and [A] for the one named A; where it mentions none, all come
        first, and where it mentions some, the others are left out. Gives a gallery of PNGs that carry their settings,
        the seed of the first, and a status line.
        """
        with in_words():
            pipeline, prompt = self.ready(), text_of(prompt)
            look = Look(view, embed)
            words, config = self.read(values)
            if not words and not prompt.strip():
                raise ValueError("Give a picture, words, or both")
            tokens, names = [word.vilex_tokens for word in words], names_of(words)
            if not words or not has_words(prompt, len(words), names):  # the sliders are greyed
                usual = {name: getattr(GenerationConfig, name) for name in MIXING}
                config = dataclasses.replace(config, **usual)
            seeds = [config.seed + i for i in range(config.num_images)]
            clock = Clock(config.num_inference_steps)
            for images, status in self.watch(pipeline.conditions(prompt, tokens, config, names), config, seeds, clock):
                yield gr.skip() if images is None else images, config.seed, status
            recipes = [self.recipe(prompt, config, words, look.embed, i) for i in range(config.num_images)]
            paths = self.save(images, [f"vilex-seed-{seed}" for seed in seeds], recipes, look.view)
            captions = [f"seed {seed}" for seed in seeds]
            note = pipeline.note(prompt, tokens, config, names)
            text = f"Drawn in {duration(clock.seconds)}. {note[:1].upper()}{note[1:]}".strip()
            yield list(zip(paths, captions, strict=True)), config.seed, finished(text)

    def read(self, values: dict[str, Any]) -> tuple[list[PictureWord], GenerationConfig]:
        """Cards and settings of a request; the settings are checked before a picture is opened."""
        cards = take_cards(values)
        config = build_config(**values, num_tokens=max((card.num_tokens for card in cards), default=DEFAULT_TOKENS))
        return [read_card(self.ready(), card) for card in cards], config

    def encode(self, **values: Any) -> tuple[str, str]:
        """The path of a .vilex file that holds the picture as that many tokens, and for a few tokens a code to copy."""
        with in_words():
            pipeline = self.ready()
            word = next(iter(self.read_cards(values)), None)
            if word is None:
                raise ValueError("Give a picture first")
            path = _new_folder() / f"{word.source}.vilex"
            save_code(path, word.vilex_tokens, pipeline.fingerprint, word.source)
            few = len(word.vilex_tokens) <= MAX_COPIED
            return str(path), to_text(load_code(path)) if few else ""

    def watch(
        self,
        conditions: Conditions,
        config: GenerationConfig,
        seeds: Sequence[int],
        clock: Clock | None = None,
        what: str = "Drawing",
    ) -> Watched:
        """(pictures or None, status HTML) per step; the last has the finished pictures, at the model's own size.

        Progress counts on from where `clock` stands. Closing it stops the work and says so in the log.
        """
        clock = clock or Clock(config.num_inference_steps)
        index, before = -1, clock.done
        events = self.engine.draw(conditions, config, list(seeds))
        try:
            for event in events:
                if isinstance(event, Waiting):
                    yield None, waiting(event.position, event.seconds, clock)
                    continue
                index = event.index
                images = self.pipeline.decode(event.latents) if _is_shown(event) else None
                yield images, clock.at(before + index + 1, what)
        except GeneratorExit:
            _log.info("stopped after step %d of %d", index + 1, config.num_inference_steps)
            raise
        finally:
            events.close()

    def recipe(
        self,
        prompt: str,
        config: GenerationConfig,
        words: Sequence[PictureWord] = (),
        share: bool = False,
        index: int = 0,
    ) -> Recipe:
        """What the PNG of picture `index` says of how it was made; `share` puts the tokens of its pictures into it."""
        used = mentioned(prompt, len(words), names_of(words))
        images = [
            build_recipe_image(
                self.pipeline, w.name, w.vilex_tokens, weight=w.weight, fit=w.fit if w.is_encoded else "",
                share=share and i in used,
            )
            for i, w in enumerate(words)
        ]  # fmt: skip
        return build_recipe(self.pipeline, prompt, config, images, index=index)

    def save(
        self, images: Sequence[Image.Image], names: Sequence[str], recipes: Sequence[Recipe], view: str
    ) -> list[str]:
        """Paths of PNGs that carry their recipe, in a folder of their own inside gradio's cache."""
        folder = _new_folder()
        paths = [str(folder / f"{name}.png") for name in names]
        for image, path, recipe in zip(images, paths, recipes, strict=True):
            save_png(self.at_size(image, view), path, recipe)
        return paths

    def at_size(self, image: Image.Image, view: str) -> Image.Image:
        """A result enlarged, where the model is small and the user wants that, or as drawn."""
        is_small = self.pipeline.t2i.embedded and image.width < SMALL_SIDE
        return self.upsampler(image) if view == "enlarged" and is_small and self.upsampler else image


def measure(pipeline: VilexPipeline) -> float:
    """Seconds that one denoising step of one picture takes on this machine."""
    steps = pipeline.stream("a picture", config=GenerationConfig(num_inference_steps=3))
    next(steps)  # the first step also warms up
    seconds = []
    for _ in range(2):  # of which the faster counts: something else may have held the machine up
        started = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def build_config(**settings: Any) -> GenerationConfig:
    """The settings of a request, checked. Raises ValueError with one sentence."""
    text_of(settings.get("negative_prompt", ""), "negative prompt")
    return GenerationConfig.from_dict(settings)


def text_of(value: object, name: str = "prompt") -> str:
    """The text itself. Raises ValueError when it is none or too long."""
    if not isinstance(value, str):
        raise ValueError(f"The {name} must be text, got {type(value).__name__}")
    if len(value) > MAX_PROMPT_CHARS:
        raise ValueError(f"The {name} has {len(value)} characters, the limit is {MAX_PROMPT_CHARS}")
    return value


def check_choice(value: object, choices: Sequence[object], name: str) -> None:
    """Raises ValueError, with the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _is_shown(step: Step) -> bool:
    done = step.index + 1
    return done in (1, step.num_inference_steps) or done % max(1, step.num_inference_steps // PREVIEWS) == 0


def _new_folder() -> Path:
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    return folder

"""What happens behind the app's buttons: check the input, call the pipeline, put errors into words.

Every long handler is a generator over the pipeline's own steps, so closing it stops the work within one
step. Nothing here remembers a user: each request carries all it needs.
"""

import dataclasses
import logging
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image

from app import budget
from vilex.codes import save_code
from vilex.config import MAX_PROMPT_CHARS, MAX_TOKENS, GenerationConfig
from vilex.images import fit_image, load_image
from vilex.pipeline import VilexPipeline
from vilex.prompt import has_words
from vilex.recipe import RecipeImage, build_recipe, save_png
from vilex.sampling import Step
from vilex.upsampler import Upsampler

RUNGS = (1, 16, 75)
VIEWS = ("enlarged", "raw")
PREVIEWS = 6  # pictures shown on the way to each result
_PREVIEW_SIZE = 64  # pixels, where no encoder says how many it reads
_log = logging.getLogger(__name__)

Upload = dict[str, Any] | None  # what gradio knows of an uploaded file; its path lies inside gradio's cache


@contextmanager
def in_words() -> Iterator[None]:
    """Turns errors into gr.Error: a user's mistake into its sentence, a defect into an id that is in the log."""
    try:
        yield
    except gr.Error:
        raise
    except (ValueError, FloatingPointError) as error:
        raise sentence(str(error)) from error
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise sentence("There is not enough memory for this: ask for fewer pictures") from error
    except Exception as error:
        number = uuid.uuid4().hex[:8]
        _log.exception("error %s", number)
        raise sentence(f"Something went wrong; the log has the details under error {number}") from error


def sentence(text: str) -> gr.Error:
    """A toast with a text that is plain, however it looks."""
    return gr.Error(escape(text, quote=False), title="That did not work", print_exception=False)


class Clock:
    """Status lines with steps done and time left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._started = total, 0, time.perf_counter()

    def tick(self, text: str) -> str:
        """The status after one more step."""
        self.done += 1
        left = self.seconds / self.done * (self.total - self.done)
        return working(f"{text} · step {self.done} of {self.total} · {duration(left)} left", self.done, self.total)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


def duration(seconds: float) -> str:
    """Seconds in words, short."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def working(text: str, done: int, total: int) -> str:
    """Status HTML of a running job."""
    return f'<p>{escape(text)}</p><progress max="{total}" value="{done}" aria-label="Progress"></progress>'


def finished(text: str) -> str:
    """Status HTML when nothing runs."""
    return f"<p>{escape(text)}</p>"


@dataclasses.dataclass(frozen=True)
class Handlers:
    """The app's functions over one pipeline; without a pipeline, `problem` says what is missing."""

    pipeline: VilexPipeline | None
    upsampler: Upsampler | None = None
    problem: str = ""

    @property
    def max_tokens(self) -> int:
        """The most tokens the pooler gives."""
        return self.pipeline.vilex.pooler.config.num_queries if self.pipeline else MAX_TOKENS

    @property
    def rungs(self) -> list[int]:
        """Token budgets of the reconstructions, cheapest first."""
        return sorted({min(rung, self.max_tokens) for rung in RUNGS})

    def look(self, picture: Upload, fit: str) -> Image.Image | None:
        """What the encoder sees of a picture; None without one."""
        with in_words():
            if picture is None:
                return None
            size = self.pipeline.vilex.encoder.image_size if self.pipeline else _PREVIEW_SIZE
            return fit_image(_load(picture), size, fit)

    def plan(self, picture: Upload, prompt: str, num_tokens: int) -> tuple[str, dict[str, Any]]:
        """The budget bar, and the text-free guidance slider with the reason when it has no effect."""
        num_images = 0 if picture is None else 1
        if self.pipeline is None:
            return finished("The slots appear here once there are weights."), gr.skip()
        try:
            config = build_config(num_tokens=num_tokens)
            bar = budget.to_html(budget.spend(self.pipeline, text_of(prompt), num_images, config.num_tokens))
            works = bool(num_images) and has_words(prompt, num_images)
        except ValueError as error:
            return f'<p class="note">{escape(str(error))}</p>', gr.skip()
        return bar, gr.update(interactive=works, info=_tfg_info(bool(num_images), works))

    def reconstruct(self, picture: Upload, fit: str, view: str, **settings: Any) -> Iterator[tuple]:
        """One picture rebuilt from its first 1, 16 and 75 tokens, cheapest first, from one shared noise.

        Gives a PNG per budget, the time each took, and a status line; unfinished ones are previews.
        """
        with in_words():
            pipeline, config, image = self._ready(), build_config(**settings), _load(_required(picture))
            _check(view, VIEWS, "view")
            tokens = pipeline.encode(image, self.max_tokens, fit)[0]
            clock = Clock(len(self.rungs) * config.num_inference_steps)
            results: list[Any] = [None] * len(self.rungs)
            times: list[str] = []
            for i, rung in enumerate(self.rungs):
                started, rung_config = clock.seconds, dataclasses.replace(config, num_tokens=rung, num_images=1)
                for step in self._steps("", [tokens], rung_config):
                    status = clock.tick(rung_name(rung))
                    is_shown = _is_shown(step)
                    if is_shown:
                        results[i] = pipeline.decode(step.latents)[0]
                    yield *(results if is_shown else [gr.skip()] * len(results)), gr.skip(), status
                name = f"vilex-{rung}-tokens-seed-{config.seed}"
                images = [RecipeImage(_stem(picture), min(rung, len(tokens)), fit=fit)]
                [results[i]] = self._save([results[i]], [name], "", rung_config, images, view)
                times.append(duration(clock.seconds - started))
                status = working(f"{rung_name(rung)} done", clock.done, clock.total)
                yield *results, times_html(self.rungs, times), status
            status = finished(f"Rebuilt in {duration(clock.seconds)} with seed {config.seed}.")
            yield *results, times_html(self.rungs, times), status

    def reconstruct_new(self, picture: Upload, fit: str, view: str, **settings: Any) -> Iterator[tuple]:
        """The same for a picture that has just come, and nothing when it was taken away."""
        if picture is not None and self.pipeline is not None:
            yield from self.reconstruct(picture, fit, view, **settings)

    def generate(self, picture: Upload, prompt: str, fit: str, view: str, **settings: Any) -> Iterator[tuple]:
        """Variations of a picture, mixes of a picture with words, or pictures of words alone.

        In the prompt <image> stands for the picture; without it the picture comes first. Gives a gallery of
        PNGs that carry their settings, the seed of the first, and a status line.
        """
        with in_words():
            pipeline, config, prompt = self._ready(), build_config(**settings), text_of(prompt)
            _check(view, VIEWS, "view")
            if picture is None and not prompt.strip():
                raise ValueError("Give a picture, words, or both")
            words = [] if picture is None else [pipeline.encode(_load(picture), config.num_tokens, fit)[0]]
            clock = Clock(config.num_inference_steps)
            for step in self._steps(prompt, words, config):
                status = clock.tick("Drawing")
                shown = pipeline.decode(step.latents) if _is_shown(step) else None
                yield gr.skip() if shown is None else shown, config.seed, status
            seeds = [config.seed + i for i in range(config.num_images)]
            images = [RecipeImage(_stem(picture), len(tokens), fit=fit) for tokens in words]
            paths = self._save(shown, [f"vilex-seed-{seed}" for seed in seeds], prompt, config, images, view)
            captions = [f"seed {seed}" for seed in seeds]
            note = pipeline.note(prompt, words, config)
            text = f"Drawn in {duration(clock.seconds)}. {note[:1].upper()}{note[1:]}".strip()
            yield list(zip(paths, captions, strict=True)), config.seed, finished(text)

    def encode(self, picture: Upload, fit: str, num_tokens: int) -> str:
        """The path of a .vilex file that holds the picture as that many tokens."""
        with in_words():
            pipeline, image = self._ready(), _load(_required(picture))
            config = build_config(num_tokens=num_tokens)
            stem = _stem(picture)
            path = _new_folder() / f"{stem}.vilex"
            save_code(path, pipeline.encode(image, config.num_tokens, fit)[0], pipeline.fingerprint, stem)
            return str(path)

    def _ready(self) -> VilexPipeline:
        if self.pipeline is None:
            raise ValueError(self.problem)
        return self.pipeline

    def _steps(self, prompt: str, words: list[torch.Tensor], config: GenerationConfig) -> Iterator[Step]:
        """The pipeline's steps; says in the log when the user stopped them."""
        steps = self.pipeline.stream(prompt, words, config)
        index = -1
        try:
            for step in steps:
                index = step.index
                yield step
        except GeneratorExit:
            _log.info("stopped after step %d of %d", index + 1, config.num_inference_steps)
            raise
        finally:
            steps.close()

    def _save(
        self,
        results: list[Image.Image],
        names: list[str],
        prompt: str,
        config: GenerationConfig,
        images: list[RecipeImage],
        view: str,
    ) -> list[str]:
        """Paths of PNGs that carry their recipe, in a folder of their own inside gradio's cache."""
        folder = _new_folder()
        paths = [str(folder / f"{name}.png") for name in names]
        for i, (result, path) in enumerate(zip(results, paths, strict=True)):
            recipe = build_recipe(self.pipeline, prompt, config, images, index=i)
            save_png(self._view(result, view), path, recipe)
        return paths

    def _view(self, image: Image.Image, view: str) -> Image.Image:
        is_small = self.pipeline.t2i.embedded
        return self.upsampler(image) if view == "enlarged" and is_small and self.upsampler else image


def measure(pipeline: VilexPipeline) -> float:
    """Seconds that one denoising step of one picture takes on this machine."""
    steps = pipeline.stream("", [Image.new("RGB", (64, 64), "grey")], GenerationConfig(num_inference_steps=2))
    next(steps)  # the first step also warms up
    started = time.perf_counter()
    next(steps)
    return time.perf_counter() - started


def build_config(**settings: Any) -> GenerationConfig:
    """The settings of a request, checked, whole numbers as int. Raises ValueError with one sentence."""
    text_of(settings.get("negative_prompt", ""), "negative prompt")
    config = GenerationConfig.from_dict(settings)
    whole = {f.name: int(getattr(config, f.name)) for f in dataclasses.fields(config) if type(f.default) is int}
    return dataclasses.replace(config, **whole)


def text_of(value: object, name: str = "prompt") -> str:
    """The text itself. Raises ValueError when it is none or too long."""
    if not isinstance(value, str):
        raise ValueError(f"The {name} must be text, got {type(value).__name__}")
    if len(value) > MAX_PROMPT_CHARS:
        raise ValueError(f"The {name} has {len(value)} characters, the limit is {MAX_PROMPT_CHARS}")
    return value


def rung_name(num_tokens: int) -> str:
    """A token budget in words."""
    return "1 token" if num_tokens == 1 else f"{num_tokens} tokens"


def times_html(rungs: Sequence[int], times: Sequence[str] = ()) -> str:
    """The line under the reconstructions: each budget, and the time it took once there is one."""
    pairs = zip_longest(map(rung_name, rungs), times, fillvalue="")
    return "".join(f"<span><strong>{escape(name)}</strong> {escape(text)}</span>" for name, text in pairs)


def _tfg_info(has_picture: bool, works: bool) -> str:
    if works:
        return "0 ignores the words, 1 is plain, more pushes towards them"
    return "Has no effect: the prompt has no words" if has_picture else "Has no effect without a picture and words"


def _is_shown(step: Step) -> bool:
    last = step.index + 1 == step.num_inference_steps
    return last or (step.index + 1) % max(1, step.num_inference_steps // PREVIEWS) == 0


def _required(picture: Upload) -> Upload:
    if picture is None:
        raise ValueError("Give a picture first")
    return picture


def _load(picture: Upload) -> Image.Image:
    path = picture.get("path") if isinstance(picture, dict) else None
    if not isinstance(path, str):
        raise ValueError("The picture must be an uploaded file")
    return load_image(path, on_note=_tell)


def _tell(note: str) -> None:
    gr.Info(escape(note, quote=False))


def _check(value: object, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _stem(picture: Upload) -> str:
    name = Path(str(picture.get("orig_name") or picture["path"])).stem
    return re.sub(r"[^\w-]+", "-", name)[:60].strip("-") or "picture"


def _new_folder() -> Path:
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    return folder

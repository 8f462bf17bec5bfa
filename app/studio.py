"""What all tabs of the page share: the components on the left, and how a listener that computes is wired."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from inspect import Parameter, Signature
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency

from app.cards import CARD_FIELDS, card_key
from app.handlers import Handlers
from app.messages import finished

SAMPLING = ("num_inference_steps", "guidance_scale", "scheduler", "guidance_low", "guidance_high", "negative_prompt")
COMPUTE = {"concurrency_id": "compute", "concurrency_limit": 24}  # requests that the engine may see at once
SILENT = {"show_progress": "hidden", "queue": False, "preprocess": False, "api_visibility": "private"}
_STOPPED = """(status) => status.includes("<progress") ? "<p>Stopped.</p>" : status"""


@dataclass(frozen=True)
class Card:
    """The components of one picture; `word` is a hidden text that holds its code when it came as one."""

    panel: gr.Column
    picture: gr.Image
    word: gr.Textbox
    name: gr.Textbox
    weight: gr.Slider
    num_tokens: gr.Slider
    fit: gr.Radio
    seen: gr.Image
    note: gr.HTML

    def inputs(self, index: int) -> dict[str, Component]:
        """The components by the argument of a handler."""
        return {card_key(name, index): getattr(self, name) for name in CARD_FIELDS}


@dataclass(frozen=True)
class Studio:
    """The page's shared parts.

    settings: by field of GenerationConfig, without num_tokens, which each card has; jobs: what Stop cancels.
    """

    handlers: Handlers
    cards: Sequence[Card]
    prompt: gr.Textbox
    settings: dict[str, Component]
    view: gr.Radio
    embed: gr.Checkbox
    status: gr.HTML
    gallery: gr.Gallery
    tabs: gr.Tabs
    jobs: list[Dependency] = field(default_factory=list)

    def inputs(self, *names: str) -> dict[str, Component]:
        """Components by argument: "cards" stands for all fields of all cards; else prompt, view, embed or a setting."""
        own = {"prompt": self.prompt, "view": self.view, "embed": self.embed}
        chosen: dict[str, Component] = {}
        for name in names:
            chosen |= self._cards() if name == "cards" else {name: own.get(name) or self.settings[name]}
        return chosen

    def _cards(self) -> dict[str, Component]:
        return {key: part for i, card in enumerate(self.cards) for key, part in card.inputs(i).items()}

    def compute(
        self,
        listen: Callable[..., Dependency],
        fn: Callable[..., Any],
        outputs: Sequence[Component],
        inputs: dict[str, Component],
        **options: Any,
    ) -> Dependency:
        """Wires a listener that computes: it waits its turn, Stop ends it, and it never runs twice at once.

        Inputs arrive by name and unprocessed: gradio would open files itself and word its own errors.
        """
        job = {"show_progress": "minimal", "show_progress_on": self.status, "preprocess": False, **COMPUTE}
        event = listen(_described(fn, inputs), None, outputs, inputs_kwargs=inputs, **(job | options))
        self.jobs.append(event)
        self._say_stopped(event)
        return event

    def say(self, event: Dependency, text: str) -> None:
        """Has the status line tell how an event ended that says nothing of it."""
        event.success(
            None, None, self.status, js=f"() => {json.dumps(finished(text))}", show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip

    def _say_stopped(self, event: Dependency) -> None:
        """Says so when an event was stopped, once the page takes the next one.

        A page ignores clicks for an event until the server has answered its cancellation. Only then does it report
        a failure, but progress that was under way may still come; the stream then ends as a success.
        """
        for listen in (event.failure, event.success):
            listen(
                None, self.status, self.status, js=_STOPPED, show_progress="hidden", api_visibility="private"
            )  # fmt: skip


def _described(fn: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """`fn` with its own docstring and arguments that may all be left out, as clients of the API see it."""
    described = update_wrapper(partial(fn), fn.func if isinstance(fn, partial) else fn)
    described.__signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in names])
    return described

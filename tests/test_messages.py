"""What the page says while it works and when it cannot."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import gradio as gr
import pytest
import torch
from PIL import Image

from app import messages
from app.engine import Engine
from app.handlers import Handlers

assert app
pytest_plugins = ["tabs"]
WISH = {"prompt": "a red dog", "view": "raw", "num_inference_steps": 3, "num_images": 2}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("seed <b> is wrong"), "seed &lt;b&gt; is wrong"),
        (FloatingPointError("not finite; try dtype float32"), "not finite; try dtype float32"),
        (torch.OutOfMemoryError("CUDA out of memory"), "There is not enough memory for this: ask for fewer pictures"),
        (gr.Error("as it is"), "as it is"),
    ],
)
def test_errors_become_one_sentence(error, said):
    with pytest.raises(gr.Error) as caught, messages.in_words():
        raise error
    assert caught.value.message == said


@pytest.mark.parametrize(
    ("position", "seconds", "said"),
    [(1, 0, "Starting"), (2, 0, "Number 2 in the queue"), (3, 40, "Number 3 in the queue · starts in about 40 s")],
)
def test_place_in_the_queue_and_time_are_said(position, seconds, said):
    assert f"<p>{said}</p><progress" in messages.waiting(position, seconds, messages.Clock(10))


def test_a_full_queue_is_said_to_the_user(pipeline, handlers):
    engine = Engine(pipeline, max_waiting=0)
    try:
        with pytest.raises(gr.Error, match=r"the queue is full: .* try again in about \d+ s"):
            list(Handlers(pipeline, engine=engine).generate(**WISH))
    finally:
        engine.close()
    assert len(list(handlers.generate(**WISH))[-1][0]) == 2


def test_unfinished_pictures_are_shown_on_the_way(handlers):
    *unfinished, (finished, _, _) = handlers.generate(**WISH)
    previews = [pictures for pictures, _, _ in unfinished if pictures != gr.skip()]
    assert len(previews) == 3 and all(isinstance(image, Image.Image) for image in previews[0])
    assert previews[0][0].tobytes() != previews[-1][0].tobytes() == Image.open(finished[0][0]).tobytes()


def test_what_has_no_effect_is_said(handlers):
    status = list(handlers.generate(**WISH | {"negative_prompt": "dog", "guidance_scale": 1}))[-1][-1]
    assert "The negative prompt has no effect at guidance 1" in status

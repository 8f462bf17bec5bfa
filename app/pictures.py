"""The tab Pictures: the gallery that Generate fills, and the picked one against the original on a slider."""

from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from app.cards import Upload, open_upload
from app.handlers import Handlers
from app.messages import in_words
from app.studio import SAMPLING, SILENT, Studio
from vilex.images import CENTRINGS

RANDOM_SEED = "Math.floor(Math.random() * 1e6)"  # short enough to read and to tell
NEW_SEED = f"(isKept, seed) => isKept ? seed : {RANDOM_SEED}"


def build_gallery() -> gr.Gallery:
    """The gallery, to be rendered in its tab."""
    return gr.Gallery(
        label="Pictures", format="png", columns=4, object_fit="contain", interactive=False, elem_id="gallery",
        buttons=["download", "download_all", "fullscreen"], height="auto", render=False,
    )  # fmt: skip


def build_pictures(studio: Studio, generate: gr.Button, lock: gr.Checkbox) -> None:
    """Lays out the tab and wires Generate to it, which draws a new seed first unless `lock` is on."""
    studio.gallery.render()
    build_take(studio, "gallery")
    slider = build_versus("versus")
    inputs = studio.inputs(
        "prompt", "view", "embed", "cards", "num_images", "tfg_scale", "seed", *SAMPLING, "words_scale"
    )
    outputs = [studio.gallery, studio.settings["seed"], studio.status]
    seed = studio.settings["seed"]
    # A page runs the listeners of one event one after the other, each to its end
    held = [part for card in studio.cards for part in (card.picture, card.word)]
    generate.click(show_tab, [studio.prompt, *held], [studio.tabs, slider], **SILENT)
    seeded = generate.click(None, [lock, seed], seed, js=NEW_SEED, show_progress="hidden", api_visibility="private")
    studio.compute(seeded.then, studio.handlers.generate, outputs, inputs, api_name="generate")

    def pick(gallery: list[dict[str, Any]], picture: Upload, fit: str, event: gr.SelectData) -> Any:
        return compare(studio.handlers, gallery, picture, fit, event.index)

    studio.gallery.select(
        pick, [studio.gallery, studio.cards[0].picture, studio.cards[0].fit], slider,
        show_progress="hidden", preprocess=False, api_visibility="private",
    )  # fmt: skip


def build_take(studio: Studio, gallery: str) -> None:
    """A button that puts what is picked in the gallery of that id into a card, as an example would go."""
    take = gr.Button("Use the picked one as a picture", size="md", elem_id=f"take-from-{gallery}")
    take.click(
        None, None, studio.status, js=f"() => takePicked('{gallery}')", show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip


def build_versus(elem_id: str) -> gr.ImageSlider:
    """A slider for picture A and a result, put away until there are both."""
    return gr.ImageSlider(
        label="Picture A against the picked result", format="png", interactive=False, elem_id=elem_id, visible=False,
        max_height=420, buttons=["fullscreen"],
    )  # fmt: skip


def show_tab(prompt: str, *held: Any) -> tuple:
    """The tab Pictures in front, its slider put away; no change where there are no words and no card holds anything."""
    if not prompt.strip() and not any(held):
        return gr.skip(), gr.skip()
    return gr.Tabs(selected="pictures"), gr.update(visible=False)


def compare(handlers: Handlers, gallery: list[dict[str, Any]], picture: Upload, fit: str, index: int) -> Any:
    """The slider with the picked result over what the encoder saw of picture A; put away when one is missing."""
    picked = gallery[index]["image"] if gallery and 0 <= index < len(gallery) else None
    return compare_two(picture, picked, fit)


def compare_two(picture: Upload, picked: Upload, fit: str) -> Any:
    """The same for a result that is known."""
    with in_words():
        if picture is None or picked is None:
            return gr.update(visible=False)
        result = open_upload(picked)
        return gr.update(value=(beside(open_upload(picture), result.size, fit), result), visible=True)


def beside(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """A picture cropped or padded to the size of a result, as the encoder's view of it is."""
    if fit in CENTRINGS:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=CENTRINGS[fit])
    return ImageOps.pad(image, size, Image.Resampling.LANCZOS, "white")

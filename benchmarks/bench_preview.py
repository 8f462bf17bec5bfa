"""How long a user looks at nothing: from a click in the browser to the first preview.

`python -m benchmarks.bench_preview` starts the app on a free port and clicks in Chromium as a user does. Seconds depend
on what else the machine does, so each is also given in calls of the bare denoiser, timed between the clicks.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import torch
from playwright.sync_api import Page, sync_playwright

from benchmarks.bench_load import running_app
from benchmarks.bench_sampling import picture
from vilex.config import GenerationConfig
from vilex.pipeline import VilexPipeline
from vilex.sampling import count_branches

PATIENCE = 120_000  # milliseconds
_CLICK = """async ([button, place]) => {
  const source = () => document.querySelector(place)?.src;
  const old = source(), started = performance.now();
  document.querySelector(button).click();
  const shown = async (isThere) => {
    while (!isThere()) await new Promise(requestAnimationFrame);
    return (performance.now() - started) / 1000;
  };
  const told = await shown(() => document.querySelector("#status progress"));
  return [told, await shown(() => source() !== old && document.querySelector(place)?.naturalWidth)];
}"""


@dataclass(frozen=True)
class Scene:
    """A button, the place of its first picture, what the status ends with, and how many pictures a step draws."""

    name: str
    button: str
    place: str
    end: str
    num_images: int


SCENES = (
    Scene("4 pictures", "#generate", "#gallery .thumbnail-item img", "Drawn in", 4),
    Scene("ladder", "#reconstruct", "#rung-1 img", "Rebuilt in", 1),
)


def watch(page: Page, scene: Scene) -> tuple[float, float]:
    """Seconds from the click to the progress bar and to the first preview; returns when all is drawn."""
    told, shown = page.evaluate(_CLICK, [scene.button, scene.place])
    page.locator("#status").get_by_text(scene.end).wait_for()
    return told, shown


def take(page: Page, scene: Scene, pipeline: VilexPipeline) -> tuple[float, float, float]:
    """The same, then seconds of one call of the bare denoiser."""
    return *watch(page, scene), denoiser_seconds(pipeline, scene.num_images)


def prepare(page: Page, url: str, image: Path) -> None:
    """Opens the page, gives it the picture and lets it be rebuilt once."""
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.locator("#budget .bar").wait_for()
    page.locator("#picture input[type=file]").set_input_files(image)
    page.locator("#status").get_by_text("Rebuilt in").wait_for()


@torch.no_grad()
def denoiser_seconds(pipeline: VilexPipeline, num_images: int) -> float:
    """Median of three calls of the denoiser, as large as those of a request without words."""
    config = GenerationConfig()
    conditions = pipeline.conditions("", [pipeline.encode(picture())[0]], config)
    rows = num_images * count_branches(conditions, config)
    condition = conditions.image.expand(rows).to(pipeline.device, pipeline.dtype)
    latents = torch.randn(rows, *pipeline.t2i.latent_shape).to(pipeline.device, pipeline.dtype)
    times = []
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        pipeline.t2i.denoise(latents, torch.tensor(500), condition)
        times.append(time.perf_counter() - started)
    return median(times[1:])


@click.command()
@click.option("--model", help="Folder, name or hub id of the weights; the default ones without it.")
@click.option("--repeats", default=5, show_default=True, help="Clicks on each button; the median counts.")
def main(model: str | None, repeats: int) -> None:
    """Prints seconds from click to progress and to the first preview, at the app's default settings."""
    pipeline = VilexPipeline.from_pretrained(model, device="cpu")
    flags = ["--device", "cpu", *(["--model", model] if model else [])]
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        image = Path(name) / "picture.png"
        picture().save(image)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with running_app(Path(name), flags) as (url, _):
            page = browser.new_page()
            prepare(page, url, image)
            for scene in SCENES:
                report(scene, [take(page, scene, pipeline) for _ in range(repeats)])
        browser.close()


def report(scene: Scene, rounds: list[tuple[float, float, float]]) -> None:
    """Prints the medians of rounds of (told, shown, one call of the denoiser)."""
    told, shown, call = (median(column) for column in zip(*rounds, strict=True))
    ratio = median(shown / call for _, shown, call in rounds)
    click.echo(
        f"{scene.name}: progress after {told:.2f} s, first preview after {shown:.2f} s, "
        f"{ratio:.1f} calls of the denoiser ({call:.3f} s)"
    )


if __name__ == "__main__":
    main()

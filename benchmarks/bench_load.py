"""The app under several users at once: throughput, waiting, memory, and whether everybody gets their own pictures.

`python -m benchmarks.bench_load` starts the app on a free port and calls it as browsers do. Every answer must carry
the seed and the words of its request, and a request made twice must give the same pictures; else the exit code is 1.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
from gradio_client import Client, handle_file
from PIL import Image

from vilex.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 600
ENDPOINTS = ("/reconstruct", "/generate")
REPEAT_EVERY = 4  # every fourth request is one that was made before
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")


@dataclass(frozen=True)
class Request:
    """What a user asks one endpoint for; the values by parameter name."""

    endpoint: str
    values: dict[str, Any] = field(hash=False)


@dataclass
class Answer:
    """What came of a request: seconds until its end, pictures (H,W,3) uint8, and what is wrong with them."""

    request: Request
    seconds: float = 0.0
    pictures: list[np.ndarray] = field(default_factory=list)
    recipes: list[Recipe | None] = field(default_factory=list)
    error: str = ""
    wrong: list[str] = field(default_factory=list)


class User:
    """One client with a session, a picture and seeds of its own, who makes one request after another."""

    def __init__(self, url: str, number: int, folder: Path, steps: int) -> None:
        self.number, self.steps, self.random = number, steps, random.Random(number)
        patient = {"timeout": 300}  # seconds of a single HTTP exchange
        self.client = Client(url, verbose=False, analytics_enabled=False, download_files=folder, httpx_kwargs=patient)
        endpoints = self.client.view_api(return_format="dict", print_info=False)["named_endpoints"]
        self.parameters = {name: endpoints[name]["parameters"] for name in ENDPOINTS}
        self.picture = folder / f"picture-{number}.png"
        draw_picture(self.random).save(self.picture)

    def run(self, deadline: float) -> list[Answer]:
        """Answers until the deadline, at least one per endpoint and one of them twice."""
        answers, asked = list[Answer](), count()
        while time.monotonic() < deadline or len(answers) <= len(ENDPOINTS):
            is_repeat = len(answers) % REPEAT_EVERY == len(ENDPOINTS)
            earlier = self.random.choice(answers) if is_repeat else None
            answer = self.ask(earlier.request if earlier else self.think_of(next(asked)))
            if earlier and not (answer.error or earlier.error or answer.wrong):
                answer.wrong += differences(earlier, answer)
            answers.append(answer)
        return answers

    def think_of(self, number: int) -> Request:
        """A new request, of each endpoint in turn."""
        endpoint = ENDPOINTS[number % len(ENDPOINTS)]
        words = f"user {self.number} wish {number} {self.random.choice(COLOURS)} <image>"
        values = {"seed": 10_000 * self.number + 10 * number, "num_inference_steps": self.steps, "view": "raw"}
        if endpoint == "/generate":
            values |= {"prompt": words, "num_images": 1 + self.number % 3}
        return Request(endpoint, values)

    def ask(self, request: Request) -> Answer:
        """The checked answer to a request."""
        answer, started = Answer(request), time.monotonic()
        values = request.values | {"picture": handle_file(self.picture)}
        names = {p["parameter_name"]: p["parameter_has_default"] for p in self.parameters[request.endpoint]}
        given = {name: values.get(name) for name, has_default in names.items() if name in values or not has_default}
        try:
            result = self.client.predict(api_name=request.endpoint, **given)
        except Exception as error:  # whatever a user may meet is counted
            answer.error = f"{type(error).__name__}: {error}"
            return answer
        answer.seconds = time.monotonic() - started
        paths = list(png_paths(result))
        answer.pictures, answer.recipes = [read(path) for path in paths], [load_recipe(path) for path in paths]
        answer.wrong = not_asked_for(request, answer.recipes)
        for path in paths:
            Path(path).unlink()
        return answer


def not_asked_for(request: Request, recipes: list[Recipe | None]) -> list[str]:
    """What the recipes of an answer say that its request does not."""
    if not recipes or None in recipes:
        return [f"{request.endpoint} gave {len(recipes)} pictures, not all with a recipe"]
    seed, count, prompt = (request.values.get(name) for name in ("seed", "num_images", "prompt"))
    expected = [seed + i for i in range(count)] if count else [seed] * len(recipes)
    wrong = []
    if (seeds := [recipe.config.seed for recipe in recipes]) != expected:
        wrong.append(f"asked for seeds {expected}, got {seeds}")
    if (prompts := {recipe.prompt for recipe in recipes}) != {prompt or ""}:
        wrong.append(f"asked for {prompt!r}, got {prompts}")
    return wrong


def differences(earlier: Answer, answer: Answer) -> list[str]:
    """What differs between two answers to one request, beyond what the size of a batch may change."""
    if len(earlier.pictures) != len(answer.pictures):
        return [f"{len(earlier.pictures)} pictures, then {len(answer.pictures)}"]
    wrong = []
    for before, after in zip(earlier.pictures, answer.pictures, strict=True):
        gap = np.abs(before.astype(int) - after)
        is_close = gap.max() <= 2 if answer.recipes[0].dtype == "float32" else gap.mean() <= 1
        if not is_close:
            wrong.append(f"the same request differs by {gap.max()} at most, {gap.mean():.2f} in the mean")
    return wrong


def draw_picture(source: random.Random) -> Image.Image:
    """Bands of random colours, of a random size."""
    colours = [tuple(source.randrange(256) for _ in range(3)) for _ in range(4)]
    image = Image.new("RGB", (1, 4))
    image.putdata(colours)
    return image.resize((source.randrange(64, 400), source.randrange(64, 400)), Image.Resampling.BICUBIC)


def png_paths(value: Any) -> Iterator[str]:
    """Paths of pictures anywhere in what an endpoint gave, in order."""
    if isinstance(value, str) and value.endswith(".png"):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from png_paths(part)


def read(path: str) -> np.ndarray:
    """A picture's levels (H,W,3) uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def running_app(folder: Path, flags: list[str]) -> Iterator[tuple[str, int]]:
    """The address and the process number of an app that is started and ended here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path, url = folder / "app.log", f"http://127.0.0.1:{port}"
    command = [sys.executable, "app.py", "--port", str(port), *flags]
    env = os.environ | {"GRADIO_TEMP_DIR": str(folder / "cache")}
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_up(process, url, log_path)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(process: subprocess.Popen, url: str, log_path: Path) -> None:
    """Returns when the page answers. Raises click.ClickException with the app's log when it never does."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    raise click.ClickException(f"the app did not start:\n{log_path.read_text(errors='replace')}")


def resident_mb(pid: int) -> float:
    """Resident memory of a process, in MB, where the system tells."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return float("nan")
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def report(answers: list[Answer], seconds: float) -> None:
    """Prints throughput and latency per endpoint, errors, and what was wrong."""
    good = [answer for answer in answers if not answer.error]
    pictures = sum(len(answer.pictures) for answer in good)
    click.echo(f"{len(good) / seconds * 60:.1f} requests/min, {pictures / seconds * 60:.1f} pictures/min")
    for endpoint in ENDPOINTS:
        times = [answer.seconds for answer in good if answer.request.endpoint == endpoint]
        if times:
            p50, p95, p99 = np.percentile(times, (50, 95, 99))
            click.echo(f"{endpoint}: {len(times)} requests, p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s")
    for error, times in Counter(answer.error for answer in answers if answer.error).most_common(10):
        click.echo(f"{times} x {error}")
    click.echo(f"{len(answers) - len(good)} errors of {len(answers)} requests")


@click.command()
@click.option("--url", help="An app that runs already; without it one is started.")
@click.option("--clients", default=8, show_default=True, help="Users at once.")
@click.option("--seconds", default=180.0, show_default=True, help="How long they go on asking.")
@click.option("--steps", default=10, show_default=True, help="Denoising steps per picture.")
@click.option("--model", help="Weights of the app that is started.")
@click.option("--device", help="Its device: cpu, cuda or mps.")
def main(url: str | None, clients: int, seconds: float, steps: int, model: str | None, device: str | None) -> None:
    """Prints what the app does under load."""
    flags = [text for name, value in (("--model", model), ("--device", device)) if value for text in (name, value)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if url is not None:
            answers = load(url, None, folder, clients, seconds, steps)
        else:
            with running_app(folder, flags) as (address, pid):
                answers = load(address, pid, folder, clients, seconds, steps)
    wrong = [sentence for answer in answers for sentence in answer.wrong]
    for sentence in wrong[:20]:
        click.echo(f"WRONG: {sentence}")
    click.echo(f"{len(wrong)} wrong answers")
    sys.exit(1 if wrong or all(answer.error for answer in answers) else 0)


def load(url: str, pid: int | None, folder: Path, clients: int, seconds: float, steps: int) -> list[Answer]:
    """The answers to all users, after a first one that warms up."""
    User(url, clients, folder, steps).run(0.0)
    users = [User(url, number, folder, steps) for number in range(clients)]
    before, started = resident_mb(pid) if pid else 0.0, time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        answers = [answer for found in threads.map(lambda user: user.run(started + seconds), users) for answer in found]
    click.echo(f"{clients} clients, {time.monotonic() - started:.0f} s, {steps} steps")
    if pid:
        click.echo(f"memory of the app: {before:.0f} MB before, {resident_mb(pid):.0f} MB after")
    report(answers, time.monotonic() - started)
    return answers


if __name__ == "__main__":
    main()

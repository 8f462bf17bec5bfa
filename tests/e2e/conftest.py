"""The real app as a process of its own, and a real browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
MODEL = "nano"
START_SECONDS = 120
PATIENCE = 60_000  # milliseconds that a busy machine may take for anything here
_QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A running app: its address and its log."""

    url: str
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_app(log_path: Path, *flags: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """The app's process and the address it will have; `flags` are added to its command."""
    port = free_port()
    command = [sys.executable, "app.py", "--port", str(port), "--steps", str(STEPS), *flags]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GRADIO_", "VILEX_"))}
    env |= {"GRADIO_TEMP_DIR": str(log_path.parent / "cache"), "HF_HUB_OFFLINE": "1", **environment}
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    return process, f"http://127.0.0.1:{port}"


def wait_until_up(process: subprocess.Popen, url: str, log_path: Path) -> None:
    """Returns when the page answers; fails with the log when it never does."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the app did not start:\n{log_path.read_text(errors='replace')}")


def stop_app(process: subprocess.Popen) -> None:
    """Ends the app as Ctrl-C would, and for good if that does not help."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def serve(folder: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """The app on `nano`, the faster of the models that come with the code."""
    log_path = folder / "log.txt"
    process, url = start_app(log_path, "--model", MODEL, *flags, **environment)
    try:
        wait_until_up(process, url, log_path)
        server = Server(url, log_path)
        assert "No weights" not in server.log, server.log
        yield server
    finally:
        stop_app(process)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("app"), "--mcp") as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """An installed Chromium, else Playwright's own."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(_QUIET))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The app in a browser session of its own; fails on an error in the page's scripts."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = open_app(context.new_page(), server.url)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
    assert not errors


def open_app(page: Page, url: str) -> Page:
    """The page once it can be used."""
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.get_by_role("button", name="Generate").wait_for()
    page.locator("#budget .bar").wait_for()  # the page's load event has come back, so it is wired
    return page


def unfold(page: Page, name: str) -> None:
    """Opens what is folded away. It joins the page only now, and gets its first values a moment later."""
    page.locator("button.label-wrap", has_text=name).click()
    page.wait_for_timeout(500)

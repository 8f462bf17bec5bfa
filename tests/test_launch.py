"""What starts the app: its flags and variables, and what every page promises whatever the weights."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import os
import runpy
import threading
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from click.testing import CliRunner, Result
from gradio.analytics import analytics_enabled

from app import ui
from app.handlers import Handlers

assert app
APP = Path(__file__).resolve().parent.parent / "app.py"


class Launched:
    """Starts the app without weights up to where it would listen; keeps what it would have listened with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.options, self.labels = folder, {}, {}

    def launch(self, demo: gr.Blocks, **options: Any) -> None:
        self.options = options
        self.labels = {getattr(block, "label", None): block for block in demo.blocks.values()}
        demo.mcp_error, demo.local_url = None, "http://here/"
        demo.server_port = options["server_port"] or 7861

    def run(self, *flags: str, **environment: str) -> Result:
        main = runpy.run_path(str(APP))["main"]
        return CliRunner().invoke(main, ["--model", str(self.folder / "nowhere"), *flags], env=environment)


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    launched = Launched(tmp_path)
    monkeypatch.setattr(gr.Blocks, "launch", lambda demo, **options: launched.launch(demo, **options))
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda demo: None)
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_MCP_SERVER", "VILEX_STEPS", "VILEX_AUTH"):
        monkeypatch.delenv(name, raising=False)
    return launched


def test_without_flags_it_listens_for_this_machine_only(launched):
    result = launched.run()
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "ViLex is at http://here/"
    assert launched.options["server_name"] == "127.0.0.1" and launched.options["server_port"] is None
    assert not (launched.options["share"] or launched.options["mcp_server"] or launched.options["auth"])
    assert "Port 7860 is busy, using 7861." in result.stdout


def test_old_files_are_cleaned_away(launched):
    launched.run()
    assert any(thread.name == "cleanup" and thread.daemon for thread in threading.enumerate())


def test_variables_are_read_and_flags_win(launched):
    variables = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": "8123"}
    launched.run(**variables, GRADIO_MCP_SERVER="True")
    assert launched.options["mcp_server"] is True
    launched.run(**variables, VILEX_STEPS="7", VILEX_AUTH="artist:se:cret")
    options = launched.options
    assert (options["server_name"], options["server_port"]) == ("0.0.0.0", 8123)
    assert options["auth"] == ("artist", "se:cret") and launched.labels["Steps"].value == 7
    launched.run("--host", "127.0.0.1", "--port", "8200", "--steps", "9", "--auth", "me:mine", **variables)
    options = launched.options
    assert (options["server_name"], options["server_port"]) == ("127.0.0.1", 8200)
    assert options["auth"] == ("me", "mine") and launched.labels["Steps"].value == 9


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--auth", "onlyaname", "write it as NAME:PASSWORD, neither of them empty"),
        ("--auth", ":secret", "write it as NAME:PASSWORD, neither of them empty"),
        ("--port", "70000", "70000 is not in the range"),
        ("--steps", "0", "0 is not in the range"),
        ("--dtype", "int8", "dtype must be"),
    ],
)
def test_bad_flags_are_one_sentence_and_nothing_starts(launched, flag, value, message):
    result = launched.run(flag, value)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not launched.options and "secret" not in result.stderr


def test_tools_and_a_password_do_not_go_together(launched):
    result = launched.run("--mcp", "--auth", "me:mine")
    assert result.exit_code == 2 and "--mcp and --auth do not work together" in " ".join(result.stderr.split())
    assert not launched.options


def test_nobody_is_told_of_the_users():
    assert not analytics_enabled() and os.environ["GRADIO_RUN_HISTORY"] == "False"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] in ("1", "True")


def test_uploads_are_limited_errors_are_shown_and_nothing_else_is_served():
    options = ui.launch_options()
    assert options["max_file_size"] == "20mb" and options["show_error"] is True and "allowed_paths" not in options


def test_every_picture_is_a_png_so_that_settings_survive():
    demo = ui.build_demo(Handlers(None, problem="no weights"))
    pictures = [block for block in demo.blocks.values() if isinstance(block, gr.Image | gr.Gallery | gr.ImageSlider)]
    assert len(pictures) > 15 and {picture.format for picture in pictures} == {"png"}

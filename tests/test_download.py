"""Pictures by address, from a server on this machine that stands for a public one."""

import app  # noqa: F401, I001  first: it sets what gradio reads at import

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gradio as gr
import pytest
from fastapi.testclient import TestClient
from gradio import routes

from app import download as downloading
from app import sources
from app.download import download
from app.ui import build_demo

assert app
pytest_plugins = ["tabs"]
HOST, PICTURE = "pictures.test", b"a picture"


class Answers(BaseHTTPRequestHandler):
    """A picture, one that is too large, and redirects to it, to a private address and to themselves."""

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        moved = {"/moved": "/my%20cat.png", "/private": f"http://127.0.0.1:{port}/my%20cat.png", "/loop": "/loop"}
        bodies = {"/my%20cat.png": PICTURE, "/large": bytes(1001)}
        self.send_response(302 if self.path in moved else 200 if self.path in bodies else 404)
        body = bodies.get(self.path, b"")
        self.send_header("Content-Length", str(len(body)))
        if self.path in moved:
            self.send_header("Location", moved[self.path])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the server, by a name that counts as public."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(downloading, "MAX_BYTES", 1000)
    find = downloading._public_ip

    async def find_here(host: str) -> str:
        return "127.0.0.1" if host == HOST else await find(host)

    monkeypatch.setattr(downloading, "_public_ip", find_here)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{HOST}:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/my%20cat.png", "/moved"])
def test_a_picture_comes_under_its_own_name_into_the_cache(address, tmp_path, path):
    found = Path(download(f" {address}{path} "))
    assert found.read_bytes() == PICTURE and found.name == "my-cat.png"
    assert found.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/private", "'127.0.0.1' is not a host that can be reached from here"),
        ("/loop", "leads on and on: more than 3 redirects"),
        ("/nothing", "answers 404, not a picture"),
        ("/large", "the file at that address is larger than"),
    ],
)
def test_what_is_no_picture_to_be_had_is_refused(address, path, message):
    with pytest.raises(ValueError, match=message):
        download(address + path)


def test_a_space_fetches_nothing(handlers, monkeypatch):
    monkeypatch.setattr(downloading, "ON_SPACES", True)
    monkeypatch.setattr(downloading, "_fetch", None)
    with pytest.raises(gr.Error, match="This server fetches nothing from addresses"):
        sources.fetch(handlers, "https://example.org/a.png", "crop")


@pytest.mark.parametrize("ip", ["100.64.0.1", "fec0::1", "10.1.2.3", "::1", "fe80::1%eth0", "0.0.0.0"])
def test_addresses_that_are_not_of_the_public_internet_are_known(ip):
    assert not downloading._is_public(ip)
    assert downloading._is_public("93.184.215.14") and downloading._is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


def test_gradio_fetches_for_a_request_by_the_same_rules(handlers, address, tmp_path):
    demo = build_demo(handlers)
    move = gr.Image(type="filepath").async_move_resource_to_block_cache
    assert Path(asyncio.run(move(f"{address}/moved"))).read_bytes() == PICTURE
    with pytest.raises(gr.Error, match="larger than"):
        asyncio.run(move(f"{address}/large"))
    client = TestClient(routes.App.create_app(demo))
    assert client.get(f"/gradio_api/file={address}/moved").status_code == 403

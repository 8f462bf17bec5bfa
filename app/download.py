"""A picture from an address: http(s) only, public hosts only, and no more bytes than a picture needs."""

import asyncio
import ipaddress
import os
import re
import uuid
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import gradio as gr
import httpx
from fastapi import HTTPException
from gradio import processing_utils, routes
from gradio.utils import get_upload_folder
from safehttpx import AsyncSecureTransport, is_public_ip

from app.messages import sentence

ON_SPACES = os.environ.get("SYSTEM") == "spaces"  # there the server fetches nothing from addresses that users name
MAX_BYTES = 20 * 2**20
SECONDS = 20
_REDIRECTS = 3


def download(address: str) -> str:
    """The path of the file at `address`, in gradio's cache.

    Raises ValueError with one sentence for an address that is none, leads to a private host, does not answer or
    holds too much, and on a Space for every address.
    """
    return asyncio.run(_download(address, get_upload_folder()))


def guard_gradio() -> None:
    """Has gradio, which fetches what a request of the API names by address, do so under the same rules.

    Its own function reads files of any size, and on a Space too. What it would pass on to a browser it refuses.
    """

    async def fetch(url: str, cache_dir: str) -> str:
        try:
            return await _download(url, cache_dir)
        except ValueError as error:
            raise gr.Error(sentence(str(error)).message) from error

    async def refuse(url: str, _: object) -> None:
        raise HTTPException(403, f"File not allowed: {url}.")

    processing_utils.async_ssrf_protected_download = fetch
    routes.secure_url_stream_response = refuse


async def _download(address: str, cache: str) -> str:
    if ON_SPACES:
        raise ValueError("This server fetches nothing from addresses: save the picture and drop it here")
    try:
        data, final = await asyncio.wait_for(_fetch(address.strip()), SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
        reason = "it did not answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        raise ValueError(f"nothing came from {address.strip()[:200]!r}: {reason}") from error
    folder = Path(cache) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    name = re.sub(r"[^\w.-]+", "-", Path(unquote(urlparse(final).path)).name)[-80:].lstrip(".-") or "picture"
    (folder / name).write_bytes(data)
    return str(folder / name)


async def _fetch(address: str) -> tuple[bytes, str]:
    for _ in range(_REDIRECTS + 1):
        parts = urlparse(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"an address starts with http:// or https://, got {address[:200]!r}")
        transport = AsyncSecureTransport(await _public_ip(parts.hostname))
        async with (
            httpx.AsyncClient(transport=transport, timeout=SECONDS) as client,
            client.stream("GET", address) as response,
        ):
            if response.is_redirect:
                address = urljoin(address, response.headers["location"])
                continue
            if response.status_code != 200:
                raise ValueError(f"{address[:200]!r} answers {response.status_code}, not a picture")
            return await _read(response), address
    raise ValueError(f"{address[:200]!r} leads on and on: more than {_REDIRECTS} redirects")


async def _public_ip(host: str) -> str:
    # not safehttpx's own check: that asks a name server of Google about each host of this network
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except (OSError, UnicodeError):
        found = []
    public = next((address[0] for *_, address in found if _is_public(address[0])), None)
    if public is None:
        raise ValueError(f"{host[:100]!r} is not a host that can be reached from here")
    return public


def _is_public(ip: str) -> bool:
    address = ipaddress.ip_address(ip.partition("%")[0])
    is_local = getattr(address, "is_site_local", False) or not address.is_global
    return is_public_ip(ip) and not is_local


async def _read(response: httpx.Response) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > MAX_BYTES:
            raise ValueError(f"the file at that address is larger than {MAX_BYTES // 2**20} MB")
    return bytes(data)

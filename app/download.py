"""A picture from an address: http(s) only, public hosts only, and no more bytes than a picture needs."""

import asyncio
import re
import uuid
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import httpx
from gradio.utils import get_upload_folder
from safehttpx import AsyncSecureTransport, is_public_ip

MAX_BYTES = 20 * 2**20
SECONDS = 20
_REDIRECTS = 3


def download(address: str) -> str:
    """The path of the file at `address`, in gradio's cache.

    Raises ValueError with one sentence for an address that is none, leads to a private host, does not answer or
    holds too much.
    """
    try:
        data, final = asyncio.run(asyncio.wait_for(_fetch(address.strip()), SECONDS))
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
        reason = "it did not answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        raise ValueError(f"nothing came from {address.strip()[:200]!r}: {reason}") from error
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
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
    public = next((address[0] for *_, address in found if is_public_ip(address[0])), None)
    if public is None:
        raise ValueError(f"{host[:100]!r} is not a host that can be reached from here")
    return public


async def _read(response: httpx.Response) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > MAX_BYTES:
            raise ValueError(f"the file at that address is larger than {MAX_BYTES // 2**20} MB")
    return bytes(data)

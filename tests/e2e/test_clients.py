"""What other programs do: the API through gradio_client, and MCP tools."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gradio_client import Client
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, Tool

from tests.e2e.conftest import Server
from vilex.recipe import load_recipe


def _run(url: str, use: Callable[[ClientSession], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:  # the browser's event loop runs in this thread
        return pool.submit(asyncio.run, _with_tools(url, use)).result()


async def _with_tools(url: str, use: Callable[[ClientSession], Any]) -> Any:
    async with (
        streamable_http_client(f"{url}/gradio_api/mcp/") as (reader, writer, _),
        ClientSession(reader, writer) as session,
    ):
        await session.initialize()
        return await use(session)


def list_tools(url: str) -> dict[str, Tool]:
    """The app's tools by the name of their endpoint."""
    answer = _run(url, lambda session: session.list_tools())
    return {tool.name.removeprefix("app_"): tool for tool in answer.tools}


def call_tool(url: str, name: str, **arguments: Any) -> CallToolResult:
    """What a tool answers."""
    return _run(url, lambda session: session.call_tool(name, arguments))


def test_words_alone_are_enough_for_the_api(server: Server) -> None:
    client = Client(server.url, verbose=False)
    gallery, seed, _ = client.predict(prompt="a red boat", num_images=1, seed=3, api_name="/generate")
    assert seed == 3
    recipe = load_recipe(gallery[0]["image"])
    assert (recipe.prompt, recipe.config.seed, recipe.images) == ("a red boat", 3, ())


def test_an_assistant_finds_the_tools_and_draws(server: Server) -> None:
    tools = list_tools(server.url)
    [generate] = [tool for name, tool in tools.items() if name.endswith("generate")]
    assert "Variations of a picture" in generate.description
    assert {"prompt", "picture", "picture_2", "seed"} <= generate.inputSchema["properties"].keys()
    assert not generate.inputSchema.get("required")
    answer = call_tool(server.url, generate.name, prompt="a red boat", num_images=1, seed=3)
    assert not answer.isError
    assert any(content.type == "text" and "vilex-seed-3.png" in content.text for content in answer.content)


def test_an_assistant_is_told_what_is_wrong(server: Server) -> None:
    [name] = [tool.name for tool in list_tools(server.url).values() if tool.name.endswith("generate")]
    answer = call_tool(server.url, name, prompt="x" * 10_000)
    assert answer.isError
    assert "The prompt has 10000 characters, the limit is 1000" in answer.content[0].text

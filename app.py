"""Starts the app: python app.py [--model NAME] [--port 7860]; see --help."""

import logging
import sys
from functools import partial
from pathlib import Path

try:  # on a Space with ZeroGPU, which must hear of it before torch does
    import spaces
except ImportError:
    spaces = None

import click
import torch

from app.about import licence_line
from app.cleanup import start_cleaning
from app.engine import Engine
from app.handlers import Handlers, measure
from app.models import LaterPipeline, named_models, other_folders
from app.ui import Notes, build_demo, launch_options
from vilex.checkpoint import find_weights
from vilex.config import DEFAULT_MODEL, GenerationConfig
from vilex.devices import pick_device, pick_dtype, require_offload
from vilex.pipeline import VilexPipeline
from vilex.upsampler import build_upsampler

DEFAULT_PORT = 7860


def parse_auth(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, str] | None:
    """Name and password of NAME:PASSWORD; None without a text."""
    if not text:
        return None
    name, _, password = text.partition(":")
    if not name or not password:
        raise click.BadParameter("write it as NAME:PASSWORD, neither of them empty")
    return name, password


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Folder, name in assets/weights, or hub id; again for others to switch to.  [env: VILEX_WEIGHTS]",
)
@click.option("--device", help="cuda, mps or cpu; by default the first there is.  [env: VILEX_DEVICE]")
@click.option("--dtype", help="float32, bfloat16 or float16 of the denoiser.  [env: VILEX_DTYPE]")
@click.option("--offload", is_flag=True, help="Keep weights off the GPU while they are not at work: slower, smaller.")
@click.option("--host", envvar="GRADIO_SERVER_NAME", default="127.0.0.1", show_default=True, show_envvar=True)
@click.option("--port", type=click.IntRange(1, 65535), envvar="GRADIO_SERVER_PORT", show_envvar=True,
              help=f"By default {DEFAULT_PORT}, or the next that is free.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1, 100), envvar="VILEX_STEPS", show_envvar=True, show_default=True,
              default=GenerationConfig.num_inference_steps, help="Denoising steps the slider starts at.")  # fmt: skip
@click.option("--share", is_flag=True, help="Also opens a public address through gradio's servers.")
@click.option("--auth", metavar="NAME:PASSWORD", envvar="VILEX_AUTH", show_envvar=True, callback=parse_auth,
              help="Asks every visitor for this name and password.")  # fmt: skip
@click.option("--mcp", is_flag=True, envvar="GRADIO_MCP_SERVER", help="Also serves the app's functions as MCP tools.")
def main(
    models: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    offload: bool,
    host: str,
    port: int | None,
    steps: int,
    share: bool,
    auth: tuple[str, str] | None,
    mcp: bool,
) -> None:
    """Opens the ViLex app in a browser page."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("app").setLevel(logging.INFO)
    try:
        if mcp and auth:
            raise ValueError("--mcp and --auth do not work together: the tools have no password to give")
        pick_dtype(dtype, pick_device(device))
        if offload:
            require_offload(pick_device(device))
        folders = other_folders(named := named_models(models))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    handlers, notes = load(next(iter(named), None), device, dtype, steps, offload)
    others = [load_later(folder, device, dtype, steps, offload) for folder in folders] if handlers.pipeline else []
    demo = build_demo(handlers, notes, others)
    try:
        demo.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth,
            mcp_server=mcp,
            prevent_thread_lock=True,
            quiet=True,
            **launch_options(),
        )
    except OSError as error:
        click.echo(f"Cannot listen on {host}, port {port or DEFAULT_PORT}: {str(error).split('.')[0]}.", err=True)
        sys.exit(1)
    start_cleaning(demo)
    if demo.mcp_error:
        click.echo("No MCP tools: they need pip install 'gradio[mcp]'.", err=True)
    if port is None and demo.server_port != DEFAULT_PORT:
        click.echo(f"Port {DEFAULT_PORT} is busy, using {demo.server_port}.")
    click.echo(f"ViLex is at {demo.local_url}" + (f" and {demo.share_url}" if share else ""))
    demo.block_thread()


def load(model: str | None, device: str | None, dtype: str | None, steps: int, offload: bool) -> tuple[Handlers, Notes]:
    """The handlers and what the page says of machine and weights; without weights the page says how to get them."""
    try:
        pipeline = VilexPipeline.from_pretrained(model, device=device, dtype=dtype, offload=offload)
        folder = Path(find_weights(model))
        notes = Notes(steps, measure(pipeline), pipeline.device.type, licence_line(folder))
    except (ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
        problem = str(error).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError):
            problem = f"{model or DEFAULT_MODEL} needs more memory than the device has: try --offload or --device cpu"
        click.echo(f"No weights: {problem}", err=True)
        return Handlers(None, problem=problem), Notes(steps=steps)
    return serve(pipeline, folder), notes


def load_later(
    folder: Path, device: str | None, dtype: str | None, steps: int, offload: bool
) -> tuple[Handlers, Notes]:  # fmt: skip
    """The same for a model that is loaded when somebody opens its page."""
    load_it = partial(VilexPipeline.from_pretrained, str(folder), device=device, dtype=dtype, offload=offload)
    return serve(LaterPipeline(folder, load_it), folder), Notes(steps, licence=licence_line(folder))


def serve(pipeline: VilexPipeline | LaterPipeline, folder: Path) -> Handlers:
    """The handlers of a model, with an engine of its own."""
    engine = Engine(pipeline, wrap=spaces.GPU if spaces else None)
    return Handlers(pipeline, build_upsampler(), folder=folder, engine=engine)


if __name__ == "__main__":
    main()

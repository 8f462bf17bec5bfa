"""Trains the method without one of its parts, and writes what each costs as a row of one table.

    python -m train.ablate --preset nano --t2i runs/t2i/t2i --data 'pictures64-train-*.parquet' \
        --validation pictures64-val-00-of-01.parquet --rows blocks-5,no-taildrop --max-steps 200 \
        --out runs/ablate

Writes ablations.json and ablations.md after each row. The same command again goes on where it stopped; other rows are
added, and a row of other settings takes the old one's place. All rows start from the same encoder and see the same
pictures and noise. Source: ViLex (CVPR 2025), section 4.4.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from train.encoder_init import read_encoder_init
from train.presets import PRESETS, Preset, TrainConfig
from train.run import RunOptions, load_data, override, start, training_options, usage_errors
from train.state import METRICS_NAME, parameter_count
from train.train_vilex import VilexRun, build_model, t2i_option
from vilex.config import DEFAULT_BUDGETS
from vilex.diffusion import load_t2i

log = logging.getLogger(__name__)
DEFAULT_ROWS = "blocks-2,blocks-5,blocks-8,no-taildrop,image-only,tokens-16"
_TABLE, _MARKDOWN = "ablations.json", "ablations.md"
_LOSSES = tuple(f"validation_loss_{n}" for n in DEFAULT_BUDGETS)


@dataclass(frozen=True)
class Row:
    """One variant of a preset; `vilex` of the preset holds all settings of its run."""

    name: str
    preset: Preset

    def settings(self) -> dict[str, Any]:
        """What the row's figures depend on, beside data and text-to-image model, ready for JSON."""
        parts = {"encoder": self.preset.encoder, "pooler": self.preset.pooler, "train": self.preset.vilex}
        return json.loads(json.dumps({name: part.to_dict() for name, part in parts.items()}))

    def folder(self, out: Path) -> Path:
        """Where its run is: another one for other settings."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()
        return out / f"{self.name}-{digest[:8]}"


def vary(preset: Preset, name: str) -> Preset:
    """The preset with what a row's name says changed. Raises ValueError when it says nothing."""
    if name == "no-taildrop":
        return replace(preset, vilex=replace(preset.vilex, tail_drop=False))
    if name == "image-only":
        return replace(preset, vilex=replace(preset.vilex, joint_fraction=0.0))
    if found := re.fullmatch(r"(blocks|tokens)-(\d+)", name):
        field = {"blocks": "num_blocks", "tokens": "num_queries"}[found[1]]
        return replace(preset, pooler=replace(preset.pooler, **{field: int(found[2])}))
    raise ValueError(f"a row is blocks-N, tokens-N, no-taildrop or image-only, got {name!r}")


def parse_rows(rows: str, preset: Preset, config: TrainConfig) -> list[Row]:
    """Rows by their names, all trained by `config` but for what they change and sampled at the start and end only."""
    config = replace(config, sample_every=config.max_steps)
    names = [name.strip() for name in rows.split(",")]
    return [Row(name, vary(replace(preset, vilex=config), name)) for name in names]


def read_table(out: Path) -> dict[str, dict[str, Any]]:
    """The rows written so far, by name."""
    path = out / _TABLE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_table(out: Path, row: Row, parameters: int) -> None:
    """Adds a finished run's figures to the table, or replaces the row of that name."""
    lines = (row.folder(out) / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    last = [line for line in map(json.loads, lines) if _LOSSES[0] in line][-1]
    figures = {name: last[name] for name in _LOSSES if name in last}
    table = read_table(out)
    table[row.name] = figures | {
        "steps": last["global_step"],
        "pictures_seen": last["images_seen"],
        "parameters": parameters,
        "settings": row.settings(),
    }
    (out / _TABLE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (out / _MARKDOWN).write_text(markdown_table(table), encoding="utf-8")


def markdown_table(table: dict[str, dict[str, Any]]) -> str:
    """Validation losses by number of tokens, a line per row; empty where a row has fewer tokens."""
    cells = [["row", *(f"{n} tokens" for n in DEFAULT_BUDGETS), "steps", "parameters"]]
    cells.append(["---"] * len(cells[0]))
    for name, row in table.items():
        losses = [f"{row[key]:.4f}" if key in row else "" for key in _LOSSES]
        cells.append([name, *losses, str(row["steps"]), f"{row['parameters'] / 1e6:.2f}M"])
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


@click.command()
@training_options
@t2i_option
@click.option("--rows", default=DEFAULT_ROWS, show_default=True, help="blocks-N, tokens-N, no-taildrop, image-only.")
def main(
    preset: str,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    stream: int | None,
    limit: int | None,
    out: Path,
    text_encoder: str | None,
    t2i_folder: Path,
    rows: str,
    workers: int,
    threads: int | None,
    minutes: float | None,
    accumulate: int,
    compiled: bool,
    fp32: bool,
    dry_run: bool,
    checkpoint_gradients: bool,
    **overrides: float | None,
) -> None:
    """Train variants of ViLex and write ablations.json and ablations.md."""
    start(threads)
    with usage_errors():
        if not validation:
            raise ValueError("the table holds losses on held-out pictures: --validation is needed")
        if minutes is not None:
            raise ValueError(f"rows are compared after as many steps: give --max-steps, not --minutes {minutes:g}")
        wanted = parse_rows(rows, PRESETS[preset], override(PRESETS[preset].vilex, overrides))
        finished = read_table(out)
        left = [row for row in wanted if finished.get(row.name, {}).get("settings") != row.settings()]
        log.info("rows to train: %s", ", ".join(row.name for row in left) or "none")
        t2i = load_t2i(t2i_folder, text_encoder)
        pictures, held_out = load_data(t2i.image_size, data, validation, limit, stream, workers)
    for row in left:
        recipe, config = row.preset, row.preset.vilex
        with usage_errors():
            tower = read_encoder_init(None, None, None, config.seed, recipe.encoder_init)
            model = build_model(recipe, t2i, seed=config.seed, pretrained=tower.pretrained)
            options = RunOptions(row.folder(out), accumulate, compiled, fp32, dry_run, checkpoint_gradients, stream)
            run = VilexRun(t2i, model, pictures, held_out, recipe, config, options, tower.distil)
            run.resume()
        run.run()
        if run.accelerator.is_main_process and not dry_run:
            write_table(out, row, parameter_count(run.module))
        run.accelerator.free_memory()
    if left:
        run.accelerator.end_training()
    if (out / _MARKDOWN).is_file():
        click.echo((out / _MARKDOWN).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

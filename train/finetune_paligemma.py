"""Fine-tunes PaliGemma on a task with the paper's settings, our encoder being its vision tower.

    python -m train.finetune_paligemma --task vqav2 --paligemma google/paligemma-3b-pt-224 --model WEIGHTS \
        --data vqa-train.parquet --validation vqa-val.parquet --out runs/vqav2

Tables have the columns `image`, `captions` or `answers`, and `question` where the task asks one. Each setting of the
task's grid is trained from the start into its own folder; a finished one is left alone, so the same command goes on.
`accelerate launch --num_processes N -m` in place of `python -m` trains on N GPUs. Source: ViLex (CVPR 2025), 4.3.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PaliGemmaForConditionalGeneration, PreTrainedTokenizerBase
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

from train.data import Pictures, batch_indices, load_pictures
from train.paligemma import (
    VilexTower,
    add_dropout,
    answer_loss,
    compose_inputs,
    load_base,
    read_base,
    save_paligemma,
)
from train.run import build_accelerator, start, usage_errors
from train.sources import require_apart
from train.state import step_generator
from train.transfer import TASKS, FinetuneConfig
from vilex.checkpoint import find_weights
from vilex.codes import fingerprint
from vilex.model import load_vilex

log = logging.getLogger(__name__)
METRICS_NAME = "metrics.json"


@dataclass(frozen=True)
class Questions:
    """Pictures with what is asked of each and what to answer; several answers stand for one another."""

    pictures: Pictures
    prompt: str
    tokenizer: PreTrainedTokenizerBase
    image_id: int
    positions: int

    def __post_init__(self) -> None:
        for record in self.pictures.records:
            if not record.captions:
                raise ValueError(f"{record.key} has neither captions nor answers, and the task learns from them")
            if "{question}" in self.prompt and not record.question:
                raise ValueError(f"{record.key} has no question, and the task asks one")

    def draw(self, indices: Tensor, chances: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels (B,3,H,W) and inputs of some pictures; chances (B,) in [0,1) choose among the answers."""
        records = [self.pictures.records[i] for i in indices.tolist()]
        answers = [r.captions[int(c * len(r.captions))] for r, c in zip(records, chances.tolist(), strict=True)]
        prompts = [self.prompt.format(question=record.question) for record in records]
        pixels = self.pictures.batch(indices)
        inputs = compose_inputs(self.tokenizer, prompts, answers, self.image_id, self.positions)
        return pixels, {name: value.to(pixels.device) for name, value in inputs.items()}


class Finetuning:
    """One setting's run, from the start to the end."""

    def __init__(
        self, model: PaliGemmaForConditionalGeneration, config: FinetuneConfig, questions: Questions,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.config, self.questions, self.accelerator = config, questions, accelerator
        self.steps = math.ceil(config.epochs * len(questions.pictures) / config.batch_size)
        add_dropout(model, config.dropout)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = cosine_schedule(optimizer, round(config.warmup_fraction * self.steps), self.steps)
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)

    @property
    def module(self) -> PaliGemmaForConditionalGeneration:
        """The model without what accelerate put around it."""
        return self.accelerator.unwrap_model(self.model)

    def run(self) -> float:
        """All steps; the last one's loss on this process."""
        hidden = not self.accelerator.is_main_process
        for step in tqdm(range(self.steps), disable=hidden, mininterval=5):
            loss = self.step(step)
        return loss

    def step(self, global_step: int) -> float:
        """One optimiser step on pictures that depend on (seed, step) alone; its mean loss on this process."""
        size, accelerator, total = self._micro_size(), self.accelerator, 0.0
        indices = batch_indices(self.config.seed, global_step, self.config.batch_size, len(self.questions.pictures))
        chances = torch.rand(len(indices), generator=step_generator(self.config.seed, global_step))
        for micro in range(accelerator.gradient_accumulation_steps):
            first = (micro * accelerator.num_processes + accelerator.process_index) * size
            share = slice(first, first + size)
            with accelerator.accumulate(self.model):
                loss = self._loss(*self.questions.draw(indices[share], chances[share]), self.config.label_smoothing)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.item() / accelerator.gradient_accumulation_steps
        self.schedule.step()
        return total

    def _micro_size(self) -> int:
        return self.config.batch_size // (self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes)

    def _loss(self, pixels: Tensor, inputs: dict[str, Tensor], label_smoothing: float) -> Tensor:
        with self.accelerator.autocast():
            return answer_loss(self.model, pixels, inputs, self.questions.positions, label_smoothing)

    @torch.no_grad()
    def validation_loss(self, held_out: Questions, batch_size: int = 16) -> float:
        """Loss on each held-out picture's first answer, without smoothing and dropout."""
        self.model.eval()
        batches = torch.arange(len(held_out.pictures)).split(batch_size)
        losses = [self._loss(*held_out.draw(rows, torch.zeros(len(rows))), 0.0).item() * len(rows) for rows in batches]
        self.model.train()
        return sum(losses) / len(held_out.pictures)


def is_finished(folder: Path, about: Mapping[str, object]) -> bool:
    """Whether the run of this setting is there already. Raises ValueError where another run is."""
    path = folder / METRICS_NAME
    if not path.is_file():
        return False
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name, value in about.items() if before.get(name) != value]:
        raise ValueError(f"{folder} holds a run with other settings ({', '.join(changed)}); give another --out")
    log.info("%s is finished", folder)
    return True


def finetune(run: Finetuning, held_out: Questions, out: Path, about: Mapping[str, object]) -> None:
    """Trains one setting and writes the model, then metrics.json, which says that it is finished, and with what."""
    last_loss = run.run()
    metrics = {**about, "steps": run.steps, "last_loss": last_loss}
    metrics["validation_loss"] = run.validation_loss(held_out)
    if run.accelerator.is_main_process:
        save_paligemma(run.module, out)
        run.questions.tokenizer.save_pretrained(out)
        (out / METRICS_NAME).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        log.info("%s: validation loss %.4f", out, metrics["validation_loss"])
    run.accelerator.wait_for_everyone()
    run.accelerator.free_memory()  # it holds on to the model otherwise, and the next setting brings its own


def choose(settings: Sequence[FinetuneConfig], setting: int | None) -> dict[int, FinetuneConfig]:
    """The grid by number, or one setting of it. Raises ValueError when there is no such number."""
    numbered = dict(enumerate(settings))
    if setting is None:
        return numbered
    if setting not in numbered:
        raise ValueError(f"the task has settings 0 to {len(settings) - 1}, got {setting}")
    return {setting: numbered[setting]}


@click.command()
@click.option("--task", type=click.Choice(sorted(TASKS)), required=True)
@click.option("--paligemma", required=True, help="PaliGemma: a folder or a hub id.")
@click.option("--model", help="ViLex weights: a folder, a name in assets/weights or a hub id.")
@click.option("--tokens", type=int, default=16, show_default=True, help="ViLex tokens per grid; 0: patch tokens alone.")
@click.option("--data", multiple=True, required=True, help="Parquet tables, folders, .tar shards or hub:NAME[@SPLIT].")
@click.option("--validation", multiple=True, required=True, help="Held-out pictures, read like --data.")
@click.option("--limit", type=click.IntRange(min=1), help="Read only this many pictures of each.")
@click.option("--setting", type=int, help="Only this one of the grid; --dry-run lists them.")
@click.option("--batch-size", type=int, default=FinetuneConfig().batch_size, show_default=True)
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Micro-batches per step.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch.")
@click.option("--fp32", is_flag=True, help="No bf16 autocast, which is off anyway where it is slow.")
@click.option("--dry-run", is_flag=True, help="List the task's settings, then stop.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    task: str,
    paligemma: str,
    model: str | None,
    tokens: int,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    limit: int | None,
    setting: int | None,
    batch_size: int,
    accumulate: int,
    seed: int,
    threads: int | None,
    fp32: bool,
    dry_run: bool,
    out: Path,
) -> None:
    """Fine-tune PaliGemma on a task with our encoder for its vision tower."""
    start(threads)
    with usage_errors():
        chosen = choose(TASKS[task].settings(batch_size=batch_size, seed=seed), setting)
        if dry_run:
            click.echo("\n".join(f"{i:02d} {json.dumps(config.to_dict())}" for i, config in chosen.items()))
            return
        accelerator = build_accelerator(chosen[min(chosen)].batch_size, accumulate, fp32)
        weights = Path(find_weights(model))
        tower, (tokenizer, base) = VilexTower(load_vilex(weights), tokens), read_base(paligemma)
        require_apart(data, validation)
        pictures = [load_pictures(list(d), image_size=tower.image_size, limit=limit) for d in (data, validation)]
        shared = {"task": task, "paligemma": paligemma, "vilex": fingerprint(tower.vilex), "tokens": tokens}
        shared |= dict(zip(("data", "validation"), (p.fingerprint() for p in pictures), strict=True))
        questions, held_out = (
            Questions(p.to(accelerator.device), TASKS[task].prompt, tokenizer, base.image_token_id, tower.num_positions)
            for p in pictures
        )
        del pictures  # those of the questions may be on an accelerator
        runs = [(config, out / f"{number:02d}", shared | config.to_dict()) for number, config in chosen.items()]
        left = [run for run in runs if not is_finished(*run[1:])]
    for config, folder, about in left:
        torch.manual_seed(seed)  # of what starts anew
        with usage_errors():
            network = load_base(paligemma, load_vilex(weights), tokens)
        torch.manual_seed(seed + accelerator.process_index)  # of dropout
        finetune(Finetuning(network, config, questions, accelerator), held_out, folder, about)


if __name__ == "__main__":
    main()

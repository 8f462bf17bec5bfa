"""The compute of all users: one thread draws what they ask for, requests of like settings in one batch.

A request waits in line, is drawn alone or beside others, and gets the latents of its own pictures after each
step. Polishing a picture's tokens is a request like them, done alone. Nothing of it is kept when it is over.
"""

import copy
import logging
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import compress

import torch
from PIL import Image
from torch import Tensor

from app.jobs import Drawing, Job, Polishing
from vilex.config import Fit, GenerationConfig, PolishConfig
from vilex.pipeline import VilexPipeline
from vilex.polish import PolishStep, polish_rows
from vilex.sampling import Conditions, Step, sample_steps

HEARTBEAT = 0.5  # seconds after which a waiting request says so again: a generator can only be closed at a yield
_MEASURED_STEPS = 32
_log = logging.getLogger(__name__)

Work = Callable[..., Generator[Step | PolishStep, Tensor | None, None]]


@dataclass(frozen=True)
class Waiting:
    """Place in the line, from 1, and whole seconds until the start; 0 also when nothing has been measured yet."""

    position: int
    seconds: int


class Engine:
    """Owner of all denoiser work of the app: one thread, and the line of requests before it.

    max_batch: rows of a denoiser call (pictures times branches) up to which waiting requests are merged; a larger
    request is drawn by itself. max_waiting: requests in line. wrap: applied to the generator functions that draw
    a batch and polish; what goes in and out of them may be pickled (`spaces.GPU` runs them in another process), and
    requests that leave a batch then keep their rows until it ends.
    """

    def __init__(
        self,
        pipeline: VilexPipeline,
        max_batch: int = 8,
        max_waiting: int = 20,
        wrap: Callable[[Work], Work] | None = None,
    ) -> None:
        self.pipeline, self.max_batch, self.max_waiting = pipeline, max_batch, max_waiting
        works = (self._draw_batch, self._polish)
        self._sampler, self._polisher = works if wrap is None else map(wrap, works)
        self._rows_can_leave = wrap is None
        # Reentrant, since the garbage collector may close a forgotten generator in a thread that holds it
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._waiting: list[Job] = []  # replaced, never changed in place, for the same reason
        self._running: list[Job] = []
        self._steps_left = 0
        self._seconds_per_row: deque[float] = deque(maxlen=_MEASURED_STEPS)
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def draw(self, conditions: Conditions, config: GenerationConfig, seeds: list[int]) -> Iterator[Waiting | Step]:
        """One picture per seed: first `Waiting`, then a Step with the latents of these pictures after each step.

        conditions: of batch 1 or of the number of pictures; the seeds, the tokens and the negative prompt of config
        are not read. Waiting comes when it changes and twice a second, and again if memory runs out and the request
        is drawn anew. A reader that falls behind misses the oldest steps, never the last. Closing the generator
        takes the request out of line, or out of its batch within one step.
        Raises ValueError when the line is full or the memory too small, RuntimeError once the engine is closed,
        and what the drawing itself raised.
        """
        expanded, changed = conditions.expand(len(seeds)), threading.Condition(self._lock)
        return self._serve(Drawing(conditions=expanded, config=config, seeds=seeds, changed=changed))

    def polish(
        self, image: Image.Image, config: PolishConfig, fit: Fit, words: str = ""
    ) -> Iterator[Waiting | PolishStep]:
        """A picture's tokens, improved, from `words` on where there are any: events as `draw` gives them."""
        cost, changed = polish_rows(self.pipeline.t2i), threading.Condition(self._lock)
        return self._serve(Polishing(image=image, config=config, fit=fit, cost=cost, words=words, changed=changed))

    def _serve(self, job: Job) -> Iterator[Waiting | Step | PolishStep]:
        try:
            event: Waiting | Step | PolishStep | None = self._enter(job)
            while event is not None:
                yield event
                event = self._next_event(job, event)
        finally:
            self._leave(job)

    def close(self) -> None:
        """Ends the thread within one step, and all requests with RuntimeError."""
        self._refuse_all()
        self._thread.join()

    def _refuse_all(self) -> None:
        with self._lock:
            self._is_closed = True
            for job in self._waiting + self._running:
                job.end(RuntimeError("the engine is closed"))
            self._waiting = []
            self._arrived.notify()

    def _enter(self, job: Job) -> Waiting:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            if len(self._waiting) >= self.max_waiting:
                seconds = max(1, round(self._seconds_left()))
                line = f"{len(self._waiting)} request{'s are' if len(self._waiting) > 1 else ' is'} waiting"
                raise ValueError(f"the queue is full: {line}; try again in about {seconds} s")
            self._waiting = [*self._waiting, job]
            self._arrived.notify()
            return self._place(job)

    def _next_event(self, job: Job, shown: Waiting | Step | PolishStep) -> Waiting | Step | PolishStep | None:
        deadline = time.monotonic() + HEARTBEAT
        with self._lock:
            while True:
                if job.steps:
                    return job.steps.popleft()
                if job.error is not None:
                    error, job.error = job.error, None  # lest its traceback and the job keep each other alive
                    raise copy.copy(error) from error
                if job.is_over:
                    return None
                place = self._place(job) if job in self._waiting else None
                seconds = deadline - time.monotonic()
                if place is not None and (place != shown or seconds <= 0):
                    return place
                job.changed.wait(None if place is None else seconds)

    def _leave(self, job: Job) -> None:
        with self._lock:
            job.is_over, job.error = True, None
            job.steps.clear()
            if job in self._waiting:
                self._waiting = [other for other in self._waiting if other is not job]
                self._tell_line()

    def _tell_line(self) -> None:
        for job in self._waiting:
            job.changed.notify()

    def _place(self, job: Job) -> Waiting:
        seconds, line = self._seconds_left(), self._waiting
        while job not in (batch := first_batch(line, self.max_batch)):
            seconds += self._seconds(batch, batch[0].num_steps)
            line = [other for other in line if other not in batch]
        return Waiting(self._waiting.index(job) + 1, round(seconds))

    def _seconds_left(self) -> float:
        """Seconds that what is drawn still takes; what was stopped ends within a step."""
        return self._seconds([job for job in self._running if not job.is_over], self._steps_left)

    def _seconds(self, jobs: list[Job], num_steps: int) -> float:
        return self.seconds_per_row * num_steps * sum(job.rows for job in jobs)

    @property
    def seconds_per_row(self) -> float:
        """Seconds that a row of a denoiser call took of late; 0 when nothing has been drawn yet."""
        with self._lock:
            return statistics.median(self._seconds_per_row) if self._seconds_per_row else 0.0

    def _work(self) -> None:
        try:
            while self._take():
                self._draw()
        finally:
            self._refuse_all()  # whatever ends the thread, nobody waits for it

    def _take(self) -> bool:
        """Moves the next batch out of the line; False when the engine is closed."""
        with self._lock:
            self._arrived.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return False
            self._running = first_batch(self._waiting, self.max_batch)
            self._steps_left = self._running[0].num_steps
            self._waiting = [job for job in self._waiting if job not in self._running]
            self._tell_line()
            return True

    def _draw(self) -> None:
        try:
            self._draw_running(self._running)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the batch's tensors
            self._retry_or_end(error)

    def _draw_running(self, jobs: list[Job]) -> None:
        if self.pipeline.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.pipeline.device)
        with closing(self._begin(jobs)) as steps:
            kept = None
            while self._running:
                started = time.perf_counter()
                step = steps.send(kept)
                kept = self._hand_out(step, time.perf_counter() - started)

    def _begin(self, jobs: list[Job]) -> Generator[Step | PolishStep, Tensor | None, None]:
        first = jobs[0]
        if isinstance(first, Polishing):
            return self._polisher(first.image, first.config, first.fit, first.words)
        conditions = Conditions.concatenate([job.conditions for job in jobs])
        return self._sampler(conditions, first.config, [seed for job in jobs for seed in job.seeds], first.in_halves)

    def _hand_out(self, step: Step | PolishStep, seconds: float) -> Tensor | None:
        """Gives each job its pictures of a step; the rows to go on with when some have left, None for all."""
        with self._lock:
            jobs, counts = self._running, [job.num_pictures for job in self._running]
            self._steps_left = jobs[0].num_steps - step.index - 1
            self._seconds_per_row.append(seconds / sum(job.rows for job in jobs))
            for job, share in zip(jobs, _shares(step, counts), strict=True):
                job.receive(share)
            stays = [not job.is_over for job in jobs]
            if all(stays) or (any(stays) and not self._rows_can_leave):
                return None
            self._running = list(compress(jobs, stays))
            return torch.tensor(stays).repeat_interleave(torch.tensor(counts)).nonzero()[:, 0]

    def _retry_or_end(self, error: Exception) -> None:
        """The jobs of a batch that failed are the next to be drawn, each alone; a job alone in halves, or it ends."""
        is_memory = isinstance(error, torch.OutOfMemoryError)
        if is_memory:
            torch.cuda.empty_cache()
        with self._lock:
            jobs, self._running = self._running, []
            if len(jobs) == 1 and is_memory and jobs[0].num_pictures > 1 and not jobs[0].in_halves:
                jobs[0].in_halves = True
            elif len(jobs) == 1:
                job = jobs.pop()
                job.end(ValueError(_memory_sentence(job.num_pictures, self.pipeline.device)) if is_memory else error)
            again = [job for job in jobs if not job.is_over]
            for job in again:
                job.is_alone = True
            if again:
                _log.warning("%d requests are drawn anew, each alone", len(again), exc_info=error)
            self._waiting = again + self._waiting
            self._tell_line()

    def _draw_batch(
        self, conditions: Conditions, config: GenerationConfig, seeds: list[int], in_halves: bool
    ) -> Generator[Step, Tensor | None, None]:
        """Steps of one batch; in halves, both go step by step, so that one call of the denoiser is half as large."""
        t2i = self.pipeline.t2i
        if not in_halves:
            return (yield from sample_steps(t2i, conditions, config, seeds))
        halves = torch.arange(len(seeds)).tensor_split(2)
        samples = [
            sample_steps(t2i, conditions.select(half), config, [seeds[i] for i in half.tolist()]) for half in halves
        ]
        for first, second in zip(*samples, strict=True):
            yield replace(first, latents=torch.cat([first.latents, second.latents]))

    def _polish(
        self, image: Image.Image, config: PolishConfig, fit: Fit, words: str
    ) -> Generator[PolishStep, Tensor | None, None]:
        yield from self.pipeline.polish_stream(image, config, words=words, fit=fit)


def _shares(step: Step | PolishStep, counts: list[int]) -> list[Step | PolishStep]:
    """The step of each job, of one of a batch with that many pictures of each."""
    if len(counts) == 1:
        return [step]
    return [replace(step, latents=part.clone()) for part in step.latents.split(counts)]  # a view keeps the others'


def first_batch(line: list[Job], max_rows: int) -> list[Job]:
    """The oldest job of a line and those behind it that can be drawn beside it."""
    batch = line[:1]
    for job in line[1:]:
        if job.fits(batch[0]) and sum(other.rows for other in [*batch, job]) <= max_rows:
            batch.append(job)
    return batch


def _memory_sentence(num_images: int, device: torch.device) -> str:
    """What to do when half of the pictures at a time were too many."""
    need = "more memory than there is"
    if device.type == "cuda":
        need = f"more than {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of memory"
    fewer = (num_images + 1) // 4  # half of the larger half
    return f"{num_images} images need {need}; try {fewer}" if fewer else f"even 1 image needs {need}"

"""What stands in the engine's line: requests to draw pictures, and requests to polish a picture's tokens."""

import threading
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field, replace

from PIL import Image

from vilex.config import Fit, GenerationConfig, PolishConfig
from vilex.polish import PolishStep
from vilex.sampling import Conditions, Step, count_branches

MAX_BEHIND = 32  # steps kept for a reader that is slower than the drawing


@dataclass(eq=False, kw_only=True)
class Job(ABC):
    """One request and what has been done of it and not been fetched yet.

    in_halves: draw it in two smaller batches, after one was too large; is_alone: never beside other jobs.
    """

    changed: threading.Condition
    steps: deque[Step | PolishStep] = field(default_factory=lambda: deque(maxlen=MAX_BEHIND))
    next_index: int = 0
    error: Exception | None = None
    is_alone: bool = False
    in_halves: bool = False
    is_over: bool = False

    @property
    @abstractmethod
    def rows(self) -> int:
        """Its work per step, in rows of a denoiser call."""

    @property
    @abstractmethod
    def num_pictures(self) -> int:
        """How many pictures it is about."""

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Steps from start to end."""

    @abstractmethod
    def fits(self, other: "Job") -> bool:
        """Whether both can be done in one batch."""

    def receive(self, step: Step | PolishStep) -> None:
        """Takes its share of a step, unless it came before a batch was begun anew."""
        if self.is_over or step.index < self.next_index:
            return
        self.steps.append(step)
        self.next_index = step.index + 1
        self.is_over = self.next_index == self.num_steps
        self.changed.notify()

    def end(self, error: Exception) -> None:
        """No more steps will come."""
        if not self.is_over:
            self.error, self.is_over = error, True
            self.changed.notify()


@dataclass(eq=False, kw_only=True)
class Drawing(Job):
    """A picture per seed; the conditions have a row per picture."""

    conditions: Conditions
    config: GenerationConfig
    seeds: list[int]

    @property
    def rows(self) -> int:
        """Pictures times branches of guidance."""
        return len(self.seeds) * count_branches(self.conditions, self.config)

    @property
    def num_pictures(self) -> int:
        return len(self.seeds)

    @property
    def num_steps(self) -> int:
        return self.config.num_inference_steps

    def fits(self, other: Job) -> bool:
        """Whether what is not a matter of each row by itself is the same."""
        return not (self.is_alone or other.is_alone) and self._shared() == other._shared()

    def _shared(self) -> tuple[tuple[str, ...], GenerationConfig]:
        of_rows = {"seed": 0, "num_images": 1, "num_tokens": 1, "negative_prompt": ""}
        return self.conditions.names, replace(self.config, **of_rows)


@dataclass(eq=False, kw_only=True)
class Polishing(Job):
    """A picture whose tokens are improved, always by itself; `words` are what they start as, if there are any.

    cost: work per step, in rows of a denoiser call.
    """

    image: Image.Image
    config: PolishConfig
    fit: Fit
    cost: int
    words: str = ""
    is_alone: bool = True

    @property
    def rows(self) -> int:
        return self.cost

    @property
    def num_pictures(self) -> int:
        return 1

    @property
    def num_steps(self) -> int:
        return self.config.num_steps

    def fits(self, other: Job) -> bool:
        """Never."""
        return False

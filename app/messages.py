"""What the page says: errors as one sentence, and status lines with progress and time left."""

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import gradio as gr
import torch

_log = logging.getLogger(__name__)


@contextmanager
def in_words() -> Iterator[None]:
    """Turns errors into gr.Error: a user's mistake into its sentence, a defect into an id that is in the log."""
    try:
        yield
    except gr.Error:
        raise
    except (ValueError, FloatingPointError) as error:
        raise sentence(str(error)) from error
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise sentence("There is not enough memory for this: ask for fewer pictures") from error
    except Exception as error:
        number = uuid.uuid4().hex[:8]
        _log.exception("error %s", number)
        raise sentence(f"Something went wrong; the log has the details under error {number}") from error


def sentence(text: str) -> gr.Error:
    """A toast with a text that is plain, however it looks."""
    return gr.Error(escape(text, quote=False), title="That did not work", print_exception=False)


def tell(text: str) -> None:
    """A passing remark on the page."""
    gr.Info(escape(text, quote=False))


class Clock:
    """Status lines with steps done and time left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._started = total, 0, time.perf_counter()

    def at(self, done: int, text: str) -> str:
        """The status after that many steps."""
        self.done = done
        left = self.seconds / done * (self.total - done)
        return working(f"{text} · step {done} of {self.total} · {duration(left)} left", done, self.total)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


def duration(seconds: float) -> str:
    """Seconds in words, short."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def working(text: str, done: int, total: int) -> str:
    """Status HTML of a running job."""
    return f'<p>{escape(text)}</p><progress max="{total}" value="{done}" aria-label="Progress"></progress>'


def waiting(position: int, seconds: int, clock: Clock) -> str:
    """Status HTML of a job in the queue."""
    soon = f" · starts in about {duration(seconds)}" if seconds else ""
    text = f"Number {position} in the queue{soon}" if seconds or position > 1 else "Starting"
    return working(text, clock.done, clock.total)


def finished(text: str) -> str:
    """Status HTML when nothing runs."""
    return f"<p>{escape(text)}</p>"

"""Many users, one denoiser: the line, batches, stopping, and who gets which picture."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from app import engine as engine_module
from app.engine import Engine, Waiting
from app.jobs import MAX_BEHIND
from vilex.config import GenerationConfig, PolishConfig
from vilex.diffusion import Conditioning
from vilex.pipeline import VilexPipeline
from vilex.polish import NOISE_DRAWS, PolishStep
from vilex.sampling import Conditions, Step, sample

FAST = GenerationConfig(num_inference_steps=3, num_tokens=5)
SOON = 60  # seconds in which anything here must happen


class Watched:
    """The denoiser of a pipeline with a gate before each call; `rows` has each call's batch size.

    `largest` is the batch that memory suffices for, `error` what a call raises instead of drawing.
    """

    def __init__(self, pipeline: VilexPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.largest, self.error = 10**6, None
        self.gate, self._denoise = threading.Event(), pipeline.t2i.denoise
        self.gate.set()
        monkeypatch.setattr(pipeline.t2i, "denoise", self._call)

    def _call(self, noisy_latents: Tensor, timesteps: Tensor, condition: Conditioning, *denoiser: object) -> Tensor:
        self.rows.append(len(noisy_latents))
        assert self.gate.wait(SOON)
        if self.error is not None:
            raise self.error
        if len(noisy_latents) > self.largest:
            raise torch.OutOfMemoryError("out of memory")
        return self._denoise(noisy_latents, timesteps, condition, *denoiser)


@pytest.fixture
def watched(pipeline: VilexPipeline, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(pipeline, monkeypatch)


@pytest.fixture
def engine(pipeline: VilexPipeline, watched: Watched) -> Iterator[Engine]:
    engine = Engine(pipeline, max_batch=9)
    yield engine
    watched.gate.set()
    engine.close()


class Request:
    """What one user asks for, and the same drawn without an engine."""

    def __init__(self, pipeline: VilexPipeline, prompt: str, seeds: Sequence[int] = (3,), **changes: object) -> None:
        self.pipeline, self.seeds, self.config = pipeline, list(seeds), replace(FAST, **changes)
        generator = torch.Generator().manual_seed(self.seeds[0])
        words = [torch.randn(7, 8, generator=generator)] if "<image>" in prompt else []
        self.conditions = pipeline.conditions(prompt, [word[: self.config.num_tokens] for word in words], self.config)

    def draw(self, engine: Engine) -> Iterator[Waiting | Step]:
        return engine.draw(self.conditions, self.config, self.seeds)

    def enter(self, engine: Engine) -> Iterator[Waiting | Step]:
        """Its events but the first, once it stands in line."""
        events = self.draw(engine)
        assert isinstance(next(events), Waiting)
        return events

    def alone(self) -> Tensor:
        return sample(self.pipeline.t2i, self.conditions, self.config, seeds=self.seeds)

    def assert_its_own(self, steps: list[Step]) -> None:
        """All steps came, once, and the last has the pictures that these conditions and seeds give alone."""
        assert [step.index for step in steps] == list(range(self.config.num_inference_steps))
        assert all(len(step.latents) == len(self.seeds) for step in steps)
        ours, alone = steps[-1].latents.clamp(-1, 1), self.alone().clamp(-1, 1)
        assert (ours - alone).abs().max() * 127.5 <= 2


@pytest.fixture
def ask(pipeline: VilexPipeline) -> Callable[..., Request]:
    return lambda *args, **changes: Request(pipeline, *args, **changes)


def steps_of(events: Iterator[Waiting | Step]) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


def wait_until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def occupy(engine: Engine, watched: Watched, request: Request) -> Iterator[Waiting | Step]:
    """A request whose first call of the denoiser is held at the gate."""
    watched.gate.clear()
    calls = len(watched.rows)
    events = request.enter(engine)
    wait_until(lambda: len(watched.rows) > calls)
    return events


def test_one_request_is_the_pipelines_own_stream(engine, pipeline, picture):
    config = replace(FAST, num_images=2, seed=8)
    expected = list(pipeline.stream("a <image> dog", [picture], config))
    conditions = pipeline.conditions("a <image> dog", [pipeline.encode(picture, config.num_tokens)[0]], config)
    first, *steps = engine.draw(conditions, config, [8, 9])
    assert first == Waiting(1, 0)
    assert [(step.index, step.num_inference_steps) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(steps, expected, strict=True))
    assert not steps[-1].latents.requires_grad


def test_nothing_is_drawn_before_the_first_event_is_asked_for(engine, ask, watched):
    engine.draw(ask("dog").conditions, FAST, [1])
    assert steps_of(ask("cat").draw(engine))
    assert len(watched.rows) == 3


def test_waiting_requests_are_drawn_in_one_batch(engine, ask, watched):
    running = occupy(engine, watched, ask("<image>"))
    one = ask("a <image>", [4], num_tokens=2, negative_prompt="blue")
    two = ask("<image> cat dog", [9, 5], num_tokens=7)
    both = one.enter(engine), two.enter(engine)
    watched.rows.clear()
    watched.gate.set()
    drawn = [steps_of(events) for events in both]
    assert len(steps_of(running)) == 3
    one.assert_its_own(drawn[0])
    two.assert_its_own(drawn[1])
    assert watched.rows[:5] == [2, 2, 9, 9, 9]  # the running one's other steps, then 3 pictures of 3 branches


@pytest.mark.parametrize(
    ("prompt", "seeds", "changes"),
    [
        ("a <image>", [4], {"guidance_scale": 3}),
        ("a <image>", [4], {"tfg_scale": 2}),
        ("a <image>", [4], {"num_inference_steps": 4}),
        ("a <image>", [4], {"scheduler": "ddim"}),
        ("a <image>", [4], {"guidance_low": 0.3}),
        ("<image>", [4], {}),  # no branch for words
        ("a dog", [4], {}),  # no branch for pictures
        ("a <image>", [4, 5, 6, 7], {}),  # with the other one 5 pictures of 3 branches, 9 rows are allowed
    ],
)
def test_requests_of_other_settings_are_not_merged(engine, ask, watched, prompt, seeds, changes):
    running = occupy(engine, watched, ask("dog"))
    requests = ask("a <image>"), ask(prompt, seeds, **changes)
    both = [request.enter(engine) for request in requests]
    watched.gate.set()
    drawn = [steps_of(events) for events in (running, *both)]
    assert len(watched.rows) == sum(len(steps) for steps in drawn)
    for request, steps in zip(requests, drawn[1:], strict=True):
        request.assert_its_own(steps)


def test_a_request_behind_another_kind_joins_the_first(engine, ask, watched):
    running = occupy(engine, watched, ask("dog"))
    kinds = ask("a dog", [1]), ask("<image>", [2]), ask("a cat", [3])
    first, other, third = (request.enter(engine) for request in kinds)
    watched.gate.set()
    for events in (third, first, other, running):
        assert len(steps_of(events)) == 3
    assert watched.rows == [2] * 3 + [4] * 3 + [2] * 3


def test_a_request_larger_than_a_batch_is_drawn_by_itself(engine, ask, watched):
    request = ask("dog", range(9))
    steps = steps_of(request.draw(engine))
    assert watched.rows == [18] * 3
    request.assert_its_own(steps)


def test_a_condition_per_picture(engine, ask):
    one, two = ask("<image>", [4]), ask("<image>", [5])
    both = Conditions.concatenate([one.conditions, two.conditions])
    *_, last = engine.draw(both, FAST, [4, 5])
    for i, request in enumerate((one, two)):
        torch.testing.assert_close(last.latents[i : i + 1], request.alone(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="conditions for 2 pictures cannot serve 3"):
        next(engine.draw(both, FAST, [4, 5, 6]))


def test_closing_takes_a_waiting_request_out_of_line(engine, ask, watched):
    running = occupy(engine, watched, ask("dog"))
    left, stays = ask("<image>").enter(engine), ask("<image> cat").enter(engine)
    left.close()
    assert next(stays).position == 1
    watched.gate.set()
    assert len(steps_of(stays)) == 3
    assert len(steps_of(running)) == 3
    assert len(watched.rows) == 6
    assert list(left) == []


def test_a_forgotten_request_leaves_the_line(engine, ask, watched):
    running = occupy(engine, watched, ask("dog"))
    forgotten, stays = ask("<image>").enter(engine), ask("<image> cat").enter(engine)
    del forgotten
    gc.collect()
    assert next(stays).position == 1
    watched.gate.set()
    assert len(steps_of(running)) == len(steps_of(stays)) == 3


def test_closing_stops_within_one_step_and_the_next_is_drawn(engine, ask, watched):
    running = occupy(engine, watched, ask("dog", num_inference_steps=50))
    following = ask("cat")
    events = following.enter(engine)
    running.close()
    watched.gate.set()
    steps = steps_of(events)
    assert len(watched.rows) == 1 + 3
    following.assert_its_own(steps)


@pytest.mark.parametrize("scheduler", ["dpm++", "sde-dpm++", "ddim", "ddpm"])
def test_a_request_leaves_its_batch_and_the_other_is_unchanged(engine, ask, watched, scheduler):
    settings = {"scheduler": scheduler, "num_inference_steps": 6}
    first, second = ask("dog", [4, 5], **settings), ask("cat", [6], **settings)
    left, stays = enter_together(engine, watched, first, second)
    wait_until(lambda: len(watched.rows) >= 3)
    left.close()
    watched.gate.set()
    steps = steps_of(stays)
    assert watched.rows[0] == 6 and watched.rows[-1] == 2 and len(watched.rows) == 6
    second.assert_its_own(steps)


def enter_together(engine: Engine, watched: Watched, *requests: Request) -> list[Iterator[Waiting | Step]]:
    """Requests in one batch, held at the gate of its third call; `rows` starts with the batch's first."""
    running = occupy(engine, watched, requests[0])
    events = [request.enter(engine) for request in requests]
    running.close()
    del watched.rows[:]
    release(watched, 3)
    return events


def release(watched: Watched, calls: int) -> None:
    """Opens the gate until so many calls have come."""
    denoise = watched._denoise

    def close_again(*args: object) -> Tensor:
        if len(watched.rows) >= calls - 1:
            watched.gate.clear()
        return denoise(*args)

    watched._denoise = close_again
    watched.gate.set()
    wait_until(lambda: len(watched.rows) >= calls)
    watched._denoise = denoise


def test_a_wrapped_sampler_draws_the_same(pipeline, ask, watched, picture):
    calls = []

    def wrap(sampler: engine_module.Work) -> engine_module.Work:
        def wrapped(*args: object) -> Iterator[Step]:
            calls.append(len(args[2]) if sampler.__name__ == "_draw_batch" else "polish")
            yield from iter(list(sampler(*args)))  # as from another process: nothing can be sent into it

        return wrapped

    first, second = ask("dog", [4, 5]), ask("cat", [6])
    with closing(Engine(pipeline, wrap=wrap)) as engine:
        running = occupy(engine, watched, ask("<image>"))
        left, stays = first.enter(engine), second.enter(engine)
        watched.gate.set()
        next(event for event in left if isinstance(event, Step))
        left.close()
        second.assert_its_own(steps_of(stays))
        assert len(steps_of(running)) == 3
        *_, last = engine.polish(picture, PolishConfig(num_tokens=3, num_steps=2), "crop")
    assert calls == [1, 3, "polish"] and last.index == 1


def test_polishing_waits_its_turn_and_the_next_waits_for_it(engine, ask, watched, picture, pipeline):
    config = PolishConfig(num_tokens=3, num_steps=3, seed=4)
    alone = pipeline.polish(picture, 3, steps=3, seed=4, fit="pad")
    watched.rows.clear()
    running = occupy(engine, watched, ask("dog"))
    polishing = engine.polish(picture, config, "pad")
    assert next(polishing).position == 1
    behind = ask("cat").enter(engine)
    watched.gate.set()
    *_, last = polishing
    assert torch.equal(last.vilex_tokens, alone)
    assert (last.index, last.num_steps, len(steps_of(running)), len(steps_of(behind))) == (2, 3, 3, 3)
    assert watched.rows == [2] * 3 + [NOISE_DRAWS] * 3 + [2] * 3


def test_a_stopped_polishing_ends_within_a_step(engine, ask, watched, picture):
    polishing = engine.polish(picture, PolishConfig(num_tokens=3, num_steps=100), "crop")
    assert isinstance(next(event for event in polishing if not isinstance(event, Waiting)), PolishStep)
    polishing.close()
    assert len(steps_of(ask("dog").draw(engine))) == 3
    assert watched.rows.count(NOISE_DRAWS) < 100


def test_an_error_in_polishing_reaches_only_its_request(engine, ask, watched, picture):
    watched.error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(ValueError, match="even 1 image needs more memory than there is"):
        list(engine.polish(picture, PolishConfig(num_tokens=3, num_steps=2), "crop"))
    watched.error = None
    assert len(steps_of(ask("dog").draw(engine))) == 3


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyError("x"), ValueError("no")])
def test_an_error_reaches_every_request_and_the_next_is_drawn(engine, ask, watched, error):
    running = occupy(engine, watched, ask("dog"))
    both = [ask("<image>", [seed]).enter(engine) for seed in (4, 5)]
    watched.error = error
    watched.gate.set()
    for events in (running, *both):
        with pytest.raises(type(error)) as caught:
            steps_of(events)
        assert caught.value.args == error.args and caught.value is not error
    watched.error = None
    request = ask("cat")
    request.assert_its_own(steps_of(request.draw(engine)))


def test_what_is_not_finite_fails_alone(engine, ask, watched):
    running = occupy(engine, watched, ask("<image>"))
    good, bad = ask("dog"), ask("cat")
    bad.conditions.joint.prompt_embeds.fill_(torch.nan)
    drawn, failed = good.enter(engine), bad.enter(engine)
    watched.gate.set()
    good.assert_its_own(steps_of(drawn))
    with pytest.raises(FloatingPointError, match="not finite at step 1; try dtype float32"):
        steps_of(failed)
    assert len(steps_of(running)) == 3


def test_euler_in_pixel_space_is_refused_by_the_sampler(engine, ask):
    with pytest.raises(ValueError, match="scheduler 'euler' does not suit this model"):
        steps_of(ask("dog", scheduler="euler").draw(engine))


def test_a_full_line_says_so(pipeline, ask, watched):
    with closing(Engine(pipeline, max_waiting=2)) as engine:
        entered = [occupy(engine, watched, ask("dog")), *(ask("cat").enter(engine) for _ in range(2))]
        sentence = r"the queue is full: 2 requests are waiting; try again in about \d+ s"
        with pytest.raises(ValueError, match=sentence):
            next(ask("bird").draw(engine))
        watched.gate.set()
        assert [len(steps_of(events)) for events in entered] == [3, 3, 3]


def test_places_and_seconds_count_down(engine, ask, watched, monkeypatch):
    ticks = iter(range(0, 10**6, 6))
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), monotonic=time.monotonic)  # 6 s a step
    monkeypatch.setattr(engine_module, "time", clock)
    steps_of(ask("dog").draw(engine))  # so that there is a measure: 3 s a row
    running = occupy(engine, watched, ask("dog"))
    second = ask("<image>", [1, 2]).enter(engine)
    third = ask("<image>", guidance_scale=1).draw(engine)
    assert next(third) == Waiting(2, 3 * 6 + 3 * 12)
    release(watched, len(watched.rows) + 1)
    assert next(third) == Waiting(2, 2 * 6 + 3 * 12)
    running.close()
    assert next(third) == Waiting(2, 3 * 12)  # what was stopped is not waited for
    release(watched, len(watched.rows) + 1)
    assert next(third) == Waiting(1, 3 * 12)
    watched.gate.set()
    assert len(steps_of(second)) == len(steps_of(third)) == 3


def test_a_waiting_request_can_be_closed_though_nothing_changes(engine, ask, watched):
    running = occupy(engine, watched, ask("dog"))
    waiting = ask("cat").draw(engine)
    started = time.monotonic()
    assert next(waiting) == next(waiting) == next(waiting)
    assert 0.9 < time.monotonic() - started < SOON
    watched.gate.set()
    assert len(steps_of(running)) == len(steps_of(waiting)) == 3


def test_everybody_gets_their_own_pictures(engine, ask):
    prompts = "dog", "<image>", "a <image> cat"
    requests = [ask(prompts[i % 3], [10 * i, 10 * i + 1][: 1 + i % 2]) for i in range(40)]

    def use(requests: list[Request]) -> list[list[Step]]:
        return [steps_of(request.draw(engine)) for request in requests]

    with ThreadPoolExecutor(8) as users:
        drawn = list(users.map(use, [requests[i::8] for i in range(8)]))
    for i, request in enumerate(requests):
        request.assert_its_own(drawn[i % 8][i // 8])


def test_a_batch_that_is_too_large_is_drawn_one_by_one(engine, ask, watched):
    watched.largest = 4
    first, second = ask("dog", [4, 5]), ask("cat", [6])
    running = occupy(engine, watched, ask("<image>"))
    both = first.enter(engine), second.enter(engine)
    watched.gate.set()
    drawn = [steps_of(events) for events in both]
    assert watched.rows == [2] * 3 + [6] + [4] * 3 + [2] * 3
    first.assert_its_own(drawn[0])
    second.assert_its_own(drawn[1])
    assert len(steps_of(running)) == 3


def test_a_request_that_is_too_large_is_drawn_in_halves(engine, ask, watched):
    watched.largest = 6
    request = ask("dog", [4, 5, 6, 7, 8])
    steps = steps_of(request.draw(engine))
    assert watched.rows == [10] + [6, 4] * 3
    watched.largest = 10
    request.assert_its_own(steps)


def test_memory_that_runs_out_on_the_way_repeats_no_step(engine, ask, watched):
    request = ask("dog", [4, 5], num_inference_steps=5)
    events = occupy(engine, watched, request)
    release(watched, 3)
    watched.largest = 2
    watched.gate.set()
    steps = steps_of(events)
    assert watched.rows == [4] * 3 + [2, 2] * 5
    watched.largest = 4
    request.assert_its_own(steps)


@pytest.mark.parametrize(
    ("num_images", "sentence"),
    [
        (16, "16 images need more memory than there is; try 4"),
        (3, "3 images need more memory than there is; try 1"),
        (2, "even 1 image needs more memory than there is"),
        (1, "even 1 image needs more memory than there is"),
    ],
)
def test_no_memory_even_for_half_is_said_in_a_sentence(engine, ask, watched, num_images, sentence):
    watched.largest = 0
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        steps_of(ask("dog", range(num_images)).draw(engine))
    watched.largest = 2
    assert len(steps_of(ask("cat").draw(engine))) == 3


def test_a_slow_reader_misses_the_oldest_steps(engine, ask, watched):
    request = ask("dog", num_inference_steps=MAX_BEHIND + 5)
    events = request.enter(engine)
    following = ask("cat").enter(engine)
    assert len(steps_of(following)) == 3
    assert [step.index for step in steps_of(events)] == list(range(5, MAX_BEHIND + 5))


@pytest.mark.parametrize("end", ["done", "closed", "failed", "behind"])
def test_nothing_of_a_finished_request_is_kept(engine, ask, watched, end):
    request = ask("dog", [4, 5])
    events = occupy(engine, watched, request)
    watched.error = RuntimeError("broken") if end == "failed" else None
    if end == "closed":
        events.close()
    watched.gate.set()
    if end == "failed":
        with pytest.raises(RuntimeError, match="broken"):
            steps_of(events)
        watched.error = None
    elif end == "done":
        assert len(steps_of(events)) == 3
    kept = weakref.ref(request.conditions.uncond.prompt_embeds)
    events.close()
    del events, request
    assert len(steps_of(ask("cat").draw(engine))) == 3  # the thread has gone on
    gc.collect()
    assert kept() is None


def test_latents_of_one_request_do_not_hold_anothers(engine, ask, watched):
    running = occupy(engine, watched, ask("<image>"))
    both = ask("dog", [4, 5]).enter(engine), ask("cat", [6]).enter(engine)
    watched.gate.set()
    for events, count in zip(both, (2, 1), strict=True):
        for step in steps_of(events):
            assert step.latents.untyped_storage().nbytes() == step.latents.nbytes and len(step.latents) == count
    assert len(steps_of(running)) == 3


def test_closing_the_engine_ends_all(pipeline, ask, watched):
    engine = Engine(pipeline)
    entered = [occupy(engine, watched, ask("dog", num_inference_steps=50)), ask("cat").enter(engine)]
    opener = threading.Thread(target=lambda: (wait_until(lambda: engine._is_closed), watched.gate.set()))
    opener.start()
    engine.close()
    opener.join()
    assert len(watched.rows) == 1
    for events in (*entered, ask("bird").draw(engine)):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            steps_of(events)

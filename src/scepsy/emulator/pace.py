"""The engine model driven by the wall clock."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from scepsy_optimizer.engine import Engine, Stretch


@dataclass(slots=True, kw_only=True, eq=False)
class Generation:
    """One sequence on its way through the engine. Times are the event loop's; `None` means not yet."""

    prompt_tokens: int
    output_tokens: int
    arrived_s: float
    done: asyncio.Future[None]
    streamed: asyncio.Event | None = None
    """Set at every new token of a generation whose tokens are sent one by one."""
    tokens: int = 0
    """New tokens so far; counted only if streamed."""
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


class Pacer:
    """Steps an engine so that each step ends when it would on the device.

    The end of a step is the previous end plus the step's duration, never the time now plus it: late wake-ups do not add
    up while the engine is busy. Steps that are alike pass as one, unless somebody waits for each of their tokens; who
    arrives or leaves meanwhile is seen by the next step.
    """

    def __init__(self, engine: Engine) -> None:
        """Must be made inside a running event loop."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._streams: set[Generation] = set()
        self._stretch: Stretch | None = None
        self._steps = 0
        self._start_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def engine(self) -> Engine:
        """The engine, to be read."""
        return self._engine

    def submit(self, *, prompt_tokens: int, output_tokens: int, arrived_s: float, streamed: bool = False) -> Generation:
        """Queue a sequence. Raises ScepsyError if the engine can never hold it."""
        generation = Generation(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            arrived_s=arrived_s,
            done=self._loop.create_future(),
            streamed=asyncio.Event() if streamed else None,
        )
        self._engine.submit(generation, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        if streamed:
            self._streams.add(generation)
        if self._stretch is None:
            self._begin(self._loop.time())
        else:
            self._shorten()
        return generation

    def abort(self, generation: Generation) -> None:
        """Forget a sequence; one that is finished is left as it is."""
        if generation.finished_s is not None:
            return
        self._engine.abort(generation)
        self._streams.discard(generation)
        generation.done.cancel()
        self._shorten()

    def _begin(self, start_s: float) -> None:
        stretch = self._stretch = self._engine.begin(max_steps=1 if self._streams else None)
        if stretch is None:
            return
        self._start_s, self._steps = start_s, stretch.steps
        for sequence, _ in stretch.chunks:
            generation = _generation(sequence.id)
            if generation.scheduled_s is None:
                generation.scheduled_s = start_s
        self._set_timer(stretch)

    def _shorten(self) -> None:
        """End the stretch with the step that is under way."""
        stretch = self._stretch
        if stretch is None or self._steps == 1:
            return
        steps = max(1, math.ceil((self._loop.time() - self._start_s) / stretch.step_s))
        if steps < self._steps:
            self._steps = steps
            self._set_timer(stretch)

    def _set_timer(self, stretch: Stretch) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._start_s + self._steps * stretch.step_s, self._finish)

    def _finish(self) -> None:
        stretch = self._stretch
        assert stretch is not None  # noqa: S101 - the timer is set for a stretch only
        end_s = self._start_s + self._steps * stretch.step_s
        finished = self._engine.complete(stretch, self._steps)
        for sequence in stretch.prefilled:
            _generation(sequence.id).first_token_s = end_s
        if self._streams:
            for sequence in (*stretch.decoding, *stretch.prefilled):
                generation = _generation(sequence.id)
                if generation.streamed is not None:
                    generation.tokens += self._steps
                    generation.streamed.set()
        for key in finished:
            generation = _generation(key)
            generation.finished_s = end_s
            self._streams.discard(generation)
            generation.done.set_result(None)
        self._begin(end_s)


def _generation(key: object) -> Generation:
    assert isinstance(key, Generation)  # noqa: S101 - nothing else is submitted
    return key

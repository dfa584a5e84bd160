"""The engine model driven by the wall clock."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from scepsy_optimizer.engine import Engine, Step


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
    first_token_s: float | None = None
    finished_s: float | None = None


class Pacer:
    """Steps an engine so that each step ends when it would on the device.

    The end of a step is the previous end plus the step's duration, never the time now plus it: late wake-ups do not add
    up while the engine is busy.
    """

    def __init__(self, engine: Engine) -> None:
        """Must be made inside a running event loop."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._step: Step | None = None
        self._end_s = 0.0
        # Those whose next token means something to somebody: the first one, or any if streamed.
        self._watched: set[Generation] = set()

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
        self._watched.add(generation)
        if self._step is None:
            self._begin(self._loop.time())
        return generation

    def abort(self, generation: Generation) -> None:
        """Forget a sequence; one that is finished is left as it is."""
        if generation.finished_s is not None:
            return
        self._engine.abort(generation)
        self._watched.discard(generation)
        generation.done.cancel()

    def _begin(self, start_s: float) -> None:
        self._step = self._engine.step()
        if self._step is not None:
            self._end_s = start_s + self._step.duration_s
            self._loop.call_at(self._end_s, self._finish)

    def _finish(self) -> None:
        step = self._step
        assert step is not None  # noqa: S101 - only a begun step is scheduled to finish
        if self._watched:
            for generation in step.tokens:
                if generation in self._watched:
                    self._tell(generation)
        for generation in step.finished:
            # An aborted one may have been in this step.
            if isinstance(generation, Generation) and not generation.done.cancelled():
                generation.finished_s = self._end_s
                self._watched.discard(generation)
                generation.done.set_result(None)
        self._begin(self._end_s)

    def _tell(self, generation: object) -> None:
        assert isinstance(generation, Generation)  # noqa: S101 - nothing else is submitted
        if generation.first_token_s is None:
            generation.first_token_s = self._end_s
        if generation.streamed is None:
            self._watched.discard(generation)
        else:
            generation.tokens += 1
            generation.streamed.set()

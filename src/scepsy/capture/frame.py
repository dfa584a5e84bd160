"""Code that runs below a handle: at once, or step by step as a generator does."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, ParamSpec

from opentelemetry import context as context_api
from opentelemetry.context.context import Context

from scepsy.capture.handle import Handle, Outcome, attach, detach, how_ended, now_ns
from scepsy.capture.safety import harmless
from scepsy.capture.tasks import settle_task

P = ParamSpec("P")


class Frame:
    """A handle and the OpenTelemetry context of the code below it, entered for as long as that code runs.

    A generator's code runs in steps, each possibly in another task or thread: what it left in the context at the end of
    one step is put back at the start of the next, and taken away from its consumer in between. Without a handle (its
    making failed) a frame does nothing.
    """

    __slots__ = ("_resumed", "_token", "handles", "left_ns")

    def __init__(self, handle: Handle | None) -> None:
        if handle is not None:
            handle.held = True
        self.handles: list[Handle] = [] if handle is None else [handle]
        """The handle, and those around it that end together with it."""
        self.left_ns: int | None = None
        self._token: object | None = None
        self._resumed: Context | None = None

    @harmless
    def enter(self) -> None:
        """The code runs, for the first time or again."""
        if self.handles:
            self._token = attach(self.handles[0]) if self._resumed is None else context_api.attach(self._resumed)

    @harmless
    def leave(self) -> None:
        """It runs no more."""
        if self._token is not None:
            detach(self._token)
            self._token = None

    @harmless
    def suspend(self) -> None:
        """It will run again, perhaps elsewhere."""
        self._resumed = context_api.get_current()
        self.left_ns = now_ns()
        self.leave()

    @harmless
    def end(self, error: BaseException | None = None) -> None:
        """It has returned, or raised `error`."""
        self.leave()
        outcome = how_ended(error)
        end_ns = self.left_ns if outcome is Outcome.ABANDONED else None
        for handle in self.handles:
            settle_task(handle)
            handle.end(error=error, outcome=outcome, end_ns=end_ns)


def generator_steps(
    begin: Callable[P, tuple[Frame, Generator[Any, Any, Any]]],
) -> Callable[P, Generator[Any, Any, Any]]:
    """A generator function that does what the generator of `begin` does, each step within its frame.

    The frame ends with the generator.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> Generator[Any, Any, Any]:
        frame, generator = begin(*args, **kwargs)
        frame.enter()
        try:
            item = next(generator)
            while True:
                frame.suspend()
                try:
                    sent = yield item
                except GeneratorExit:
                    frame.enter()
                    generator.close()
                    raise
                except BaseException as thrown:  # noqa: BLE001 - it belongs to the generator
                    frame.enter()
                    item = generator.throw(thrown)
                else:
                    frame.enter()
                    item = generator.send(sent)
        except StopIteration as stop:
            frame.end()
            return stop.value
        except BaseException as error:
            frame.end(error)
            raise

    return run


def _first_of(generator: AsyncGenerator[Any, Any]) -> Awaitable[Any]:
    """Its first step, of which the event loop does not hear: that would close it beside the generator around it."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return anext(generator)
    finally:
        sys.set_asyncgen_hooks(*hooks)


def async_generator_steps(
    begin: Callable[P, tuple[Frame, AsyncGenerator[Any, Any]]],
) -> Callable[P, AsyncGenerator[Any, Any]]:
    """The same for an async generator."""

    async def run(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Any, Any]:
        frame, generator = begin(*args, **kwargs)
        frame.enter()
        try:
            item = await _first_of(generator)
            while True:
                frame.suspend()
                try:
                    sent = yield item
                except GeneratorExit:
                    frame.enter()
                    await generator.aclose()
                    raise
                except BaseException as thrown:  # noqa: BLE001 - it belongs to the generator
                    frame.enter()
                    item = await generator.athrow(thrown)
                else:
                    frame.enter()
                    item = await generator.asend(sent)
        except StopAsyncIteration:
            frame.end()
        except BaseException as error:
            frame.end(error)
            raise

    return run

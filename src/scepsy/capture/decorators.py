"""`workflow`, `agent` and `tool`: name the parts of a program, whatever kind of function they are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, Final, Protocol, TypeVar, overload

from opentelemetry import context as context_api

from scepsy import semconv
from scepsy.capture.recorder import Handle, Outcome, attach, detach, how_ended, now_ns, recorder
from scepsy.capture.safety import tell
from scepsy.capture.tasks import settle_task
from scepsy_optimizer.errors import ScepsyError

F = TypeVar("F", bound=Callable[..., Any])


class _Decorator(Protocol):
    @overload
    def __call__(self, function: F, /) -> F: ...
    @overload
    def __call__(self, *, name: str | None = None) -> Callable[[F], F]: ...


def _decorator(kind: str, meaning: str) -> _Decorator:
    def decorate(function: Any = None, /, *, name: str | None = None) -> Any:
        if function is None:
            return lambda inner: _wrap(kind, inner, name)
        return _wrap(kind, function, name)

    decorate.__name__ = decorate.__qualname__ = kind
    decorate.__doc__ = (
        f"Mark a function as {meaning}. Works on plain and async functions and generators, bare or with `name=`, which "
        "otherwise is the function's own.\n\nRaises ScepsyError if what it marks is not a function."
    )
    return decorate


workflow: Final = _decorator(semconv.KIND_WORKFLOW, "a workflow: each run of the outermost one is an execution")
agent: Final = _decorator(semconv.KIND_AGENT, "an agent: the LLM calls below it carry its name as their role")
tool: Final = _decorator(semconv.KIND_TOOL, "a tool: its time is not LLM time, but LLM calls below it still count")


def _wrap(kind: str, function: Any, name: str | None) -> Any:
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(_wrap(kind, function.__func__, name))
    if isinstance(function, type) or not callable(function):
        raise ScepsyError(
            f"@scepsy.{kind} marks functions, not {function!r:.80}; put it right above the 'def' line, "
            "below any decorator that turns the function into an object"
        )
    called = name or getattr(function, "__name__", None) or type(function).__name__
    if inspect.isasyncgenfunction(function):
        return _wrap_async_generator(kind, function, called)
    if inspect.isgeneratorfunction(function):
        return _wrap_generator(kind, function, called)
    if inspect.iscoroutinefunction(function):
        return _wrap_async(kind, function, called)
    return _wrap_plain(kind, function, called)


class _Frame:
    """A handle and the OpenTelemetry context of the code below it, entered for as long as that code runs.

    A generator's code runs in steps, each possibly in another task or thread: what it left in the context at the end of
    one step is put back at the start of the next, and taken away from its consumer in between.
    """

    __slots__ = ("_resumed", "_token", "handle", "left_ns")

    def __init__(self, kind: str, name: str) -> None:
        self.handle: Handle | None = None
        self._token: object | None = None
        self._resumed: context_api.Context | None = None
        self.left_ns: int | None = None
        try:
            self.handle = recorder.start(kind, name)
        except Exception as error:  # noqa: BLE001 - the program goes on without its span
            tell(f"@scepsy.{kind}", error)

    def enter(self) -> None:
        if self.handle is None:
            return
        try:
            self._token = attach(self.handle) if self._resumed is None else context_api.attach(self._resumed)
        except Exception as error:  # noqa: BLE001 - as above
            tell("entering a span", error)

    def leave(self) -> None:
        if self._token is not None:
            detach(self._token)
            self._token = None

    def suspend(self) -> None:
        self._resumed = context_api.get_current()
        self.left_ns = now_ns()
        self.leave()

    def end(self, error: BaseException | None = None) -> None:
        self.leave()
        if self.handle is None:
            return
        try:
            settle_task(self.handle)
            outcome = how_ended(error)
            end_ns = self.left_ns if outcome is Outcome.ABANDONED else None
            self.handle.end(error=error, outcome=outcome, end_ns=end_ns)
        except Exception as failure:  # noqa: BLE001 - as above
            tell("ending a span", failure)


def _wrap_plain(kind: str, function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        frame = _Frame(kind, name)
        frame.enter()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            frame.end(error)
            raise
        if inspect.iscoroutine(result):
            frame.suspend()
            return _finish(frame, result)
        frame.end()
        return result

    return run


async def _finish(frame: _Frame, running: Coroutine[Any, Any, Any]) -> Any:
    """The rest of a plain function that turned out to return a coroutine."""
    frame.enter()
    try:
        result = await running
    except BaseException as error:
        frame.end(error)
        raise
    frame.end()
    return result


def _wrap_async(kind: str, function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        frame = _Frame(kind, name)
        frame.enter()
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:
            frame.end(error)
            raise
        frame.end()
        return result

    return run


def _wrap_generator(kind: str, function: Callable[..., Generator[Any, Any, Any]], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        frame = _Frame(kind, name)
        frame.enter()
        try:
            generator = function(*args, **kwargs)
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


def _wrap_async_generator(
    kind: str, function: Callable[..., AsyncGenerator[Any, Any]], name: str
) -> Callable[..., Any]:
    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        frame = _Frame(kind, name)
        frame.enter()
        try:
            generator = function(*args, **kwargs)
            item = await anext(generator)
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

"""`workflow`, `agent` and `tool`: name the parts of a program, whatever kind of function they are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar, overload

from scepsy import semconv
from scepsy.capture.frame import Frame, async_generator_steps, generator_steps
from scepsy.capture.handle import Handle
from scepsy.capture.recorder import recorder
from scepsy.capture.safety import harmless
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
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        return _wrap_generator(kind, function, called)
    if inspect.iscoroutinefunction(function):
        return _wrap_async(kind, function, called)
    return _wrap_plain(kind, function, called)


@harmless
def _start(kind: str, name: str) -> Handle:
    return recorder.start(kind, name)


def _wrap_plain(kind: str, function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        frame = Frame(_start(kind, name))
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


async def _finish(frame: Frame, running: Coroutine[Any, Any, Any]) -> Any:
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
        frame = Frame(_start(kind, name))
        frame.enter()
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:
            frame.end(error)
            raise
        frame.end()
        return result

    return run


def _wrap_generator(kind: str, function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def begin(*args: Any, **kwargs: Any) -> tuple[Frame, Any]:
        generator = function(*args, **kwargs)
        return Frame(_start(kind, name)), generator

    steps = async_generator_steps(begin) if inspect.isasyncgenfunction(function) else generator_steps(begin)
    return functools.wraps(function)(steps)

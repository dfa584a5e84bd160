"""Carrying what is current across threads and processes, where Python itself does not."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Generic, ParamSpec, TypeVar

from opentelemetry import context as context_api
from opentelemetry.context.context import Context

from scepsy.capture.recorder import recorder
from scepsy.capture.safety import tell

P = ParamSpec("P")
R = TypeVar("R")


class Propagated(Generic[P, R]):
    """A function together with the context in which it was made; see `propagate`."""

    def __init__(self, function: Callable[P, R]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._context = contextvars.copy_context()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it in a copy of that context, so that calls may overlap."""
        return self._context.copy().run(self._function, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A context cannot be sent to another process; the identity of its span can."""
        return _continue, (self._function, self._context.copy().run(_headers))


def _headers() -> dict[str, str]:
    around, _ = recorder.around()
    return {} if around is None else dict(around.traceparent())


def _continue(function: Callable[P, R], headers: dict[str, str]) -> Callable[P, R]:
    return functools.partial(_run_continued, function, headers)


def _run_continued(function: Callable[..., R], headers: dict[str, str], /, *args: Any, **kwargs: Any) -> R:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    token = context_api.attach(TraceContextTextMapPropagator().extract(headers, Context()))
    try:
        return function(*args, **kwargs)
    finally:
        context_api.detach(token)


def propagate(function: Callable[P, R]) -> Callable[P, R]:
    """Give `function` the context of this moment, for `threading.Thread`, thread pools and process pools.

    What it does then belongs to the workflow that is running now. Sent to another process, its spans continue the
    trace there, if that process is instrumented as well.
    """
    return Propagated(function)


class ContextThreadPoolExecutor(ThreadPoolExecutor):
    """A thread pool whose tasks belong to the workflow that submitted them."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Schedule `fn(*args, **kwargs)` in a copy of the current context."""
        return super().submit(contextvars.copy_context().run, fn, *args, **kwargs)


_thread_start: Final = threading.Thread.start
_pool_submit: Final = ThreadPoolExecutor.submit


def _carried(thread: threading.Thread, context: contextvars.Context) -> Callable[[], None]:
    run = thread.run

    def carried() -> None:
        # The thread holds this and this the thread: what it has worked on would wait for the garbage collector.
        vars(thread).pop("run", None)
        context.run(run)

    return carried


def patch_threads() -> None:
    """Let every new thread and every task of every thread pool start in a copy of the context that started it."""

    def start(self: threading.Thread) -> None:
        if not isinstance(getattr(self.run, "__self__", None), contextvars.Context):
            try:
                self.run = _carried(self, contextvars.copy_context())  # type: ignore[method-assign]
            except Exception as error:  # noqa: BLE001 - the thread must start all the same
                tell("threading.Thread.start", error)
        _thread_start(self)

    def submit(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return _pool_submit(self, contextvars.copy_context().run, fn, *args, **kwargs)

    threading.Thread.start = start  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submit  # type: ignore[method-assign, assignment]


def restore_threads() -> None:
    """Undo `patch_threads`."""
    threading.Thread.start = _thread_start  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = _pool_submit  # type: ignore[method-assign]

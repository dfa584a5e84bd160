"""LLM calls whose end no framework tells: those cancelled with their asyncio task, or by a timeout inside it."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from scepsy.capture.handle import Handle, Outcome
from scepsy.capture.safety import harmless

_guarded: Final[dict[asyncio.AbstractEventLoop, dict[asyncio.Task[Any], set[Handle]]]] = {}
"""The calls that each unfinished task has opened, by the event loop that runs the task."""


def current_task() -> asyncio.Task[Any] | None:
    """The asyncio task that runs now; None in a thread without an event loop as well."""
    loop = asyncio._get_running_loop()  # noqa: SLF001 - documented; the other way to ask raises, which takes long
    return None if loop is None else asyncio.current_task(loop)


def guard_task(handle: Handle) -> None:
    """End `handle` as cancelled if the current asyncio task finishes before it does."""
    task = current_task()
    if task is None:
        return
    loop = task.get_loop()
    tasks = _guarded.get(loop)
    if tasks is None:
        _let_go_of_closed_loops()
        tasks = _guarded[loop] = {}
    handles = tasks.get(task)
    if handles is None:
        handles = tasks[task] = set()
        task.add_done_callback(_finished)
    elif len(handles) > _TIDY_AT:
        handles.difference_update([known for known in handles if not known.live])
    handles.add(handle)


_TIDY_AT: Final = 64


def unguard(handle: Handle) -> None:
    """The current task has opened `handle` and passes it on: whoever goes on with it will tell its end."""
    guarded = _opened_here()
    if guarded:
        guarded.discard(handle)


@harmless
def _finished(task: asyncio.Task[Any]) -> None:
    loop = task.get_loop()
    tasks = _guarded.get(loop, {})
    handles = tasks.pop(task, ())
    if not tasks:
        _guarded.pop(loop, None)
    for handle in handles:
        _cancel(handle)


@harmless
def _let_go_of_closed_loops() -> None:
    """The tasks of a loop that was closed go no further, and nobody is told that they have finished."""
    for loop in list(_guarded):  # loops come and go in other threads
        if loop.is_closed():
            for handles in _guarded.pop(loop, {}).values():
                for handle in handles:
                    _cancel(handle)


def settle_task(parent: Handle) -> None:
    """`parent` ends in the current task: calls below it that this very task was waiting for are over as well."""
    if not _guarded:
        return
    guarded = _opened_here()
    if not guarded:
        return
    for handle in list(guarded):
        if not handle.live:
            guarded.discard(handle)
        elif _is_below(handle, parent):
            guarded.discard(handle)
            _cancel(handle)


def _opened_here() -> set[Handle] | None:
    """The calls that the current task has opened."""
    task = current_task()
    return None if task is None else _guarded.get(task.get_loop(), {}).get(task)


def _cancel(handle: Handle) -> None:
    # A stream is not what its task waits for: whoever reads it may be elsewhere, and will tell.
    if handle.live and handle.first_ns is None:
        handle.end(outcome=Outcome.CANCELLED)


def _is_below(handle: Handle, parent: Handle) -> bool:
    above = handle.parent
    while above is not None and above is not parent:
        above = above.parent
    return above is parent

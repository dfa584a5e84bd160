"""LLM calls whose end no framework tells: those cancelled with their asyncio task, or by a timeout inside it."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from scepsy.capture.handle import Handle, Outcome
from scepsy.capture.safety import harmless

_guarded: Final[dict[asyncio.Task[Any], set[Handle]]] = {}
"""The calls that each unfinished task has opened."""


def current_task() -> asyncio.Task[Any] | None:
    """The asyncio task that runs now; None in a thread without an event loop as well."""
    loop = asyncio._get_running_loop()  # noqa: SLF001 - documented; the other way to ask raises, which takes long
    return None if loop is None else asyncio.current_task(loop)


def guard_task(handle: Handle) -> None:
    """End `handle` as cancelled if the current asyncio task finishes before it does."""
    task = current_task()
    if task is None:
        return
    handles = _guarded.get(task)
    if handles is None:
        handles = _guarded[task] = set()
        task.add_done_callback(_finished)
    elif len(handles) > _TIDY_AT:
        handles.difference_update([known for known in handles if not known.live])
    handles.add(handle)


_TIDY_AT: Final = 64


@harmless
def _finished(task: asyncio.Task[Any]) -> None:
    for handle in _guarded.pop(task, ()):
        _cancel(handle)


def settle_task(parent: Handle) -> None:
    """`parent` ends in the current task: calls below it that this very task was waiting for are over as well."""
    if not _guarded:
        return
    task = current_task()
    guarded = None if task is None else _guarded.get(task)
    if not guarded:
        return
    for handle in list(guarded):
        if not handle.live:
            guarded.discard(handle)
        elif _is_below(handle, parent):
            guarded.discard(handle)
            _cancel(handle)


def _cancel(handle: Handle) -> None:
    # A stream is not what its task waits for: whoever reads it may be elsewhere, and will tell.
    if handle.first_ns is None:
        handle.end(outcome=Outcome.CANCELLED)


def _is_below(handle: Handle, parent: Handle) -> bool:
    above = handle.parent
    while above is not None and above is not parent:
        above = above.parent
    return above is parent

"""How far a long reading is, on a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PATIENCE_S = 2.0
_REFRESH_S = 0.1


class LateProgress:
    """A bar with the remaining time, shown if the work goes on for more than two seconds and there is a terminal.

    A context manager; calling it says which part of the work is done. The bar goes away at the end.
    """

    def __init__(self, what: str, console: Console) -> None:
        self._console = console
        self._what = what
        self._begin_s = time.monotonic()
        self._shown_s = self._begin_s
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> LateProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: float) -> None:
        """Say how much is done, from 0 to 1."""
        now_s = time.monotonic()
        if now_s - self._shown_s < _REFRESH_S:
            return
        self._shown_s = now_s
        if self._bar is None:
            if now_s - self._begin_s < _PATIENCE_S or not self._console.is_terminal:
                return
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self._what, total=1.0)
            self._bar.start()
        self._bar.update(self._task, completed=done)


@contextmanager
def waiting(what: str, console: Console) -> Iterator[None]:
    """Show for how long something goes on whose end nobody knows, after two seconds and if there is a terminal.

    A context manager, or around one call: `waiting("stopping", console)(stop)(name)`.
    """
    if not console.is_terminal:
        yield
        return
    shown = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    )
    shown.add_task(what, total=None)
    late = threading.Timer(_PATIENCE_S, shown.start)
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
        late.join()
        shown.stop()

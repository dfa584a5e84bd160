"""How far measuring a profile is: each measurement as a line, and on a terminal how much is left below them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from scepsy.profiling import Progress


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Shows each measurement as a line, and on a terminal how much is left below them."""

    def line(told: Progress) -> None:
        console.print(told.text, soft_wrap=True, markup=False, highlight=False)

    if not console.is_terminal:
        yield line
        return
    columns = bars.BarColumn(), bars.MofNCompleteColumn(), bars.TextColumn("measurements"), _TimeLeft()
    with bars.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("", total=None, end_s=None)

        def tell(told: Progress) -> None:
            line(told)
            end_s = None if told.left_s is None else time.monotonic() + told.left_s
            shown.update(task, completed=told.done, total=told.points, end_s=end_s)

        yield tell


class _TimeLeft(bars.ProgressColumn):
    """Counts down between two measurements, each of which may take minutes."""

    def render(self, task: bars.Task) -> Text:
        end_s = task.fields["end_s"]
        if end_s is None:
            return Text("")
        return Text(f"about {timedelta(seconds=max(0, round(end_s - time.monotonic())))} left")

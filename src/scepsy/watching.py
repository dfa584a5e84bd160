"""What a running deployment was asked lately: the recent executions of its traces, and their rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scepsy.deployment.state import read_order
from scepsy.traces.assemble import fill_in
from scepsy.traces.reading import NoExecutionError, iter_executions
from scepsy.traces.records import Tally
from scepsy.traces.sources import is_named_as_traces
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.workload import Workload, aggregate

_NS_PER_S: Final = 1e9
_SHORTEST_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The executions that ended within a window, and how many of them came per second."""

    workload: Workload
    rate_rps: float


def record_folder(directory: Path) -> Path:
    """Where the deployment of that folder records its calls. Raises ScepsyError if it does not."""
    record = read_order(directory).record
    if record is None:
        raise ScepsyError(
            f"deployment {directory.name!r} records no calls: deploy it with --record FOLDER, or name the folder that "
            "the agents write their traces to (--traces)"
        )
    return Path(record)


def recent(folder: Path, *, window_s: float, now_s: float) -> Seen | None:
    """What ended in the last `window_s` before `now_s` (seconds since the epoch); None if nothing did.

    Files that were not written to since are not read. The rate is over the window, or, where the first execution ever
    began later than that, over the time since. Raises ScepsyError for traces that cannot be read.
    """
    begin_s = now_s - window_s
    try:
        found = [(path, path.stat()) for path in folder.rglob("*") if is_named_as_traces(path) and path.is_file()]
    except OSError as error:
        raise ScepsyError(f"{folder}: cannot be read ({error.strerror})") from error
    # Nothing is in a file that somebody has only opened yet.
    files = sorted(path for path, about in found if about.st_mtime >= begin_s and about.st_size)
    if not files:
        return None
    executions = []
    first_s = now_s
    try:
        tally = Tally()
        for execution in fill_in(iter_executions(files, tally), tally):
            start_s = execution.started_ns / _NS_PER_S
            first_s = min(first_s, start_s)
            if begin_s <= start_s + execution.makespan_s <= now_s:
                executions.append(execution)
    except NoExecutionError:
        # What has only begun is no fault: somebody may just have started.
        return None
    if not executions:
        return None
    span_s = max(_SHORTEST_S, min(window_s, now_s - first_s))
    return Seen(workload=aggregate(executions), rate_rps=len(executions) / span_s)

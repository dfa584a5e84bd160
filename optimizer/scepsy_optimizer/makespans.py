"""Makespans of all executions of a workload at once, and their tangents, as arrays.

The same longest paths as in `timeline.py`, laid out level by level over all executions: an event's level is the
longest chain of events before it, so each level is a few array operations, however many executions there are. A search
evaluates some hundred allocations, each over every execution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.pipeline import counted_tokens
from scepsy_optimizer.replica import CallSpeed
from scepsy_optimizer.workload import Workload

Ints = NDArray[np.int_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tangents:
    """Executions at some speeds: `makespans_s`, and for each execution the tangent of its makespan there.

    `coefficients[e, m]` are the calls of LLM m on the critical path of execution e, their computed prompt tokens and
    their generated tokens; `fixed_s[e]` is the rest of that path. `fixed_s + coefficients · speeds` is the makespan
    where it was built, and a lower bound at all other speeds.
    """

    makespans_s: Floats
    fixed_s: Floats
    coefficients: Floats


@dataclass(frozen=True, slots=True)
class _Level:
    """Events of one level, and their predecessors: those of event i are `before[starts[i]:starts[i + 1]]`."""

    events: Ints
    before: Ints
    starts: Ints
    owner: Ints


class Makespans:
    """The executions of a workload, compiled. `llms` are the rows of the speeds that the methods take."""

    __slots__ = ("_call_llm", "_call_of", "_call_tokens", "_delay_s", "_levels", "_roots", "_sinks", "llms")

    def __init__(self, workload: Workload) -> None:
        self.llms = tuple(demand.llm for demand in workload.demands)
        rows = {llm: row for row, llm in enumerate(self.llms)}
        delays: list[float] = []
        call_of: list[int] = []
        levels: list[int] = []
        predecessors: list[list[int]] = []
        sinks: list[int] = []
        calls: list[tuple[int, int, int]] = []
        for timeline in workload.timelines:
            first_event, first_call = len(delays), len(calls)
            delays += timeline.delay_s
            call_of += [first_call + call if call >= 0 else -1 for call in timeline.call_of]
            for before in timeline.predecessors:
                events = [first_event + event for event in before]
                predecessors.append(events)
                levels.append(1 + max((levels[event] for event in events), default=-1))
            sinks.append(first_event + timeline.sink)
            calls += [(rows[call.llm], *counted_tokens(call)) for call in timeline.calls]
        self._delay_s = np.array(delays)
        self._call_of = np.array(call_of)
        self._sinks = np.array(sinks)
        self._call_llm = np.array([llm for llm, _, _ in calls])
        self._call_tokens = np.array([(1.0, float(computed), float(generated)) for _, computed, generated in calls])
        order = np.argsort(np.array(levels), kind="stable")
        cuts = np.flatnonzero(np.diff(np.array(levels)[order])) + 1
        first, *later = np.split(order, cuts)
        self._roots = first
        self._levels = tuple(_level(events, predecessors) for events in later)

    def speeds(self, speeds: Mapping[str, CallSpeed]) -> Floats:
        """Speeds by LLM as rows of fixed_s, input_s, output_s in the order of `llms`."""
        return np.array([[speeds[llm].fixed_s, speeds[llm].input_s, speeds[llm].output_s] for llm in self.llms])

    def makespans_s(self, speeds: Floats) -> Floats:
        """Makespan of each execution at those speeds (a row per LLM of fixed_s, input_s, output_s)."""
        times, _ = self._times(speeds, with_path=False)
        found: Floats = times[self._sinks]
        return found

    def tangents(self, speeds: Floats) -> Tangents:
        """Makespans and their tangents at those speeds."""
        times, latest = self._times(speeds, with_path=True)
        executions = len(self._sinks)
        fixed_s = np.zeros(executions)
        coefficients = np.zeros((executions, len(self.llms), 3))
        event, execution = self._sinks, np.arange(executions)
        while len(event):
            fixed_s[execution] += self._delay_s[event]
            call = self._call_of[event]
            on_call = call >= 0
            made, call = execution[on_call], call[on_call]
            # An execution is there once, so no entry is added to twice.
            coefficients[made, self._call_llm[call]] += self._call_tokens[call]
            event = latest[event]
            going = event >= 0
            event, execution = event[going], execution[going]
        return Tangents(makespans_s=times[self._sinks], fixed_s=fixed_s, coefficients=coefficients)

    def _times(self, speeds: Floats, *, with_path: bool) -> tuple[Floats, Ints]:
        """When each event happens and, if asked for, which of its predecessors it waited for (-1 for none)."""
        durations_s = np.maximum(0.0, (speeds[self._call_llm] * self._call_tokens).sum(axis=1))
        spent_s = self._delay_s + np.where(self._call_of >= 0, np.append(durations_s, 0.0)[self._call_of], 0.0)
        times = np.zeros(len(spent_s))
        latest = np.full(len(spent_s) if with_path else 0, -1)
        times[self._roots] = spent_s[self._roots]
        for level in self._levels:
            before_s = times[level.before]
            ready_s = np.maximum.reduceat(before_s, level.starts)
            times[level.events] = ready_s + spent_s[level.events]
            if with_path:
                # Of equally late predecessors the first, as in `Timeline.critical_path`: written last, from behind.
                hits = np.flatnonzero(before_s == ready_s[level.owner])[::-1]
                latest[level.events[level.owner[hits]]] = level.before[hits]
        return times, latest


def _level(events: Ints, predecessors: list[list[int]]) -> _Level:
    counts = np.array([len(predecessors[event]) for event in events])
    return _Level(
        events=events,
        before=np.array([before for event in events for before in predecessors[event]]),
        starts=np.concatenate([[0], np.cumsum(counts)[:-1]]),
        owner=np.repeat(np.arange(len(events)), counts),
    )

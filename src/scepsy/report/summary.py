"""All that a report says, as plain values: what `--json` prints and the page shows."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from scepsy_optimizer.shape import shape_of
from scepsy.traces import Reading
from scepsy_optimizer.executions import Execution, Span
from scepsy_optimizer.timeline import CriticalPath, Timeline, call_graph
from scepsy_optimizer.workload import LLMDemand, Workload

FORMAT: Final = "scepsy-report/1"
PRECISION: Final = 0.1
"""The relative half width of a share's interval that the report counts executions for."""

_SHOWN_EXECUTIONS = 200
_SHOWN_SPANS = 2000
_GRAPHED_EXECUTIONS = 300
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 24


def summarise(reading: Reading, workload: Workload, *, timelines: bool = True) -> dict[str, Any]:
    """The report on a reading and its workload (`aggregate(reading.executions)`), ready to be written as JSON.

    `timelines` adds the spans of up to 200 executions, from the shortest to the longest, for drawing.
    """
    executions = reading.executions
    paths = [timeline.critical_path(timeline.traced_s) for timeline in workload.timelines]
    summary: dict[str, Any] = {
        "format": FORMAT,
        "executions": len(executions),
        "calls": sum(len(timeline.calls) for timeline in workload.timelines),
        "spans": reading.spans,
        "files": reading.files,
        "latency_s": workload.latency_s,
        "latency_cv": workload.latency_cv,
        "tool_s": workload.tool_s,
        "workflows": _workflows(executions, workload, paths),
        "llms": [_llm(demand, workload) for demand in workload.demands],
        "roles": _roles(workload),
        "critical_path_s": _critical(workload, paths),
        "transitions": _transitions(executions),
        "queueing": _queueing(workload.timelines),
        "dropped": dict(sorted(reading.dropped.items())),
        "repaired": dict(sorted(reading.repaired.items())),
    }
    if timelines:
        summary["timelines"] = _timelines(executions, workload.timelines, paths)
    return summary


def executions_needed(demand: LLMDemand, executions: int) -> int | None:
    """How many more executions would bring the share's 95 % interval to ±10 % of the share, 0 if it is there.

    The width falls with the square root of the number. None where the share is 0 or there is one execution only.
    """
    if demand.share <= 0 or executions < 2:
        return None
    relative = (demand.share_high - demand.share_low) / 2 / demand.share
    return max(0, math.ceil(executions * (relative / PRECISION) ** 2) - executions)


def _llm(demand: LLMDemand, workload: Workload) -> dict[str, Any]:
    durations = np.array(
        [
            traced
            for timeline in workload.timelines
            for call, traced in zip(timeline.calls, timeline.traced_s, strict=True)
            if call.llm == demand.llm
        ]
    )
    return {
        "llm": demand.llm,
        "visits": demand.visits,
        "critical_visits": demand.critical_visits,
        "parallelism": demand.parallelism,
        "input_tokens": demand.input_tokens,
        "cached_tokens": demand.cached_tokens,
        "output_tokens": demand.output_tokens,
        "longest_tokens": demand.longest_tokens,
        "service_s": demand.service_s,
        "share": demand.share,
        "share_low": demand.share_low,
        "share_high": demand.share_high,
        "share_cv": demand.share_cv,
        "more_executions": executions_needed(demand, workload.executions),
        "call_s": _distribution(durations),
        "visits_distribution": _distribution(
            np.array(
                [sum(call.llm == demand.llm for call in timeline.calls) for timeline in workload.timelines], dtype=float
            )
        ),
    }


def _distribution(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """Mean, quantiles and a histogram."""
    counts, edges = np.histogram(values, bins=min(_BINS, max(1, len(np.unique(values)))))
    return {
        "mean": float(values.mean()),
        "quantiles": {f"{level:g}": float(np.quantile(values, level)) for level in _QUANTILES},
        "low": float(edges[0]),
        "high": float(edges[-1]),
        "counts": counts.tolist(),
    }


def _workflows(
    executions: Sequence[Execution], workload: Workload, paths: Sequence[CriticalPath]
) -> list[dict[str, Any]]:
    found = []
    for workflow, number in sorted(workload.workflows.items(), key=lambda item: (-item[1], item[0])):
        rows = [index for index, execution in enumerate(executions) if execution.workflow == workflow]
        makespans = np.array([paths[index].makespan_s for index in rows])
        shapes = [shape_of(executions[index]) for index in rows]
        found.append(
            {
                "workflow": workflow,
                "executions": number,
                "latency_s": _distribution(makespans),
                "latency_cv": float(makespans.std(ddof=1) / makespans.mean())
                if number > 1 and makespans.mean() > 0
                else 0.0,
                "tool_s": float(np.mean([paths[index].fixed_s for index in rows])),
                "calls": float(np.mean([len(workload.timelines[index].calls) for index in rows])),
                "width": {"mean": float(np.mean([s.width for s in shapes])), "max": max(s.width for s in shapes)},
                "depth": {"mean": float(np.mean([s.depth for s in shapes])), "max": max(s.depth for s in shapes)},
                "recursion": max(s.recursion for s in shapes),
                "rounds": {"mean": float(np.mean([s.rounds for s in shapes])), "max": max(s.rounds for s in shapes)},
            }
        )
    return found


def _roles(workload: Workload) -> list[dict[str, Any]]:
    """Each LLM's calls by what they were made for."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    tokens: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for timeline in workload.timelines:
        for call, traced in zip(timeline.calls, timeline.traced_s, strict=True):
            seconds[call.llm, call.role].append(max(0.0, traced - (call.queue_s or 0.0)))
            tokens[call.llm, call.role].append((call.input_tokens, call.output_tokens))
    total = sum(map(sum, seconds.values()))
    return [
        {
            "llm": llm,
            "role": role,
            "visits": len(found) / workload.executions,
            "input_tokens": float(np.mean([pair[0] for pair in tokens[llm, role]])),
            "output_tokens": float(np.mean([pair[1] for pair in tokens[llm, role]])),
            "share": sum(found) / total if total > 0 else 0.0,
        }
        for (llm, role), found in sorted(seconds.items(), key=lambda item: -sum(item[1]))
    ]


def _critical(workload: Workload, paths: Sequence[CriticalPath]) -> dict[str, Any]:
    """Mean seconds of wall time by what was waited for; all together the mean makespan."""
    by_llm: dict[str, float] = {demand.llm: 0.0 for demand in workload.demands}
    outside = 0.0
    for timeline, path, weight in zip(workload.timelines, paths, workload.weights, strict=True):
        outside += weight * path.fixed_s
        for index in path.calls:
            by_llm[timeline.calls[index].llm] += weight * timeline.traced_s[index]
    return {"llms": by_llm, "outside_llms": outside}


def _transitions(executions: Sequence[Execution]) -> list[dict[str, Any]]:
    """How often, in a mean execution, a call waits for another: from one (LLM, role) to the next; None is the start."""
    step = max(1, math.ceil(len(executions) / _GRAPHED_EXECUTIONS))
    sample = executions[::step]
    counts: Counter[tuple[tuple[str, str] | None, tuple[str, str]]] = Counter()
    for execution in sample:
        graph = call_graph(execution)
        names = {span.id: (span.call.llm, span.call.role) for span in execution.calls if span.call is not None}
        for call in graph:
            if graph.in_degree(call) == 0:
                counts[None, names[call]] += 1
        counts.update((names[source], names[target]) for source, target in graph.edges)
    return [
        {
            "from": None if source is None else list(source),
            "to": list(target),
            "per_execution": count / len(sample),
        }
        for (source, target), count in counts.most_common()
    ]


def _queueing(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """How much of the calls' time is known to be queueing, and for which part of the calls that is known."""
    calls = [
        (call.queue_s, traced)
        for timeline in timelines
        for call, traced in zip(timeline.calls, timeline.traced_s, strict=True)
    ]
    known = [(queue_s, traced) for queue_s, traced in calls if queue_s is not None]
    busy_s = sum(traced for _, traced in known)
    return {
        "known_part": len(known) / len(calls),
        "part_of_time": sum(queue_s for queue_s, _ in known) / busy_s if busy_s > 0 else None,
    }


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting the figures, one sentence each."""
    found = []
    queueing = summary["queueing"]
    if queueing["known_part"] < 1:
        part = f"{1 - queueing['known_part']:.0%} of the calls"
        found.append(
            f"The queueing of {part} is not recorded: if the engines were loaded while tracing, the shares contain it."
        )
    elif (queueing["part_of_time"] or 0) > PRECISION:
        found.append(
            f"{queueing['part_of_time']:.0%} of the calls' time was queueing. It is not counted in the shares, but it "
            "is in the latencies: the engines were loaded while tracing."
        )
    needed = {llm["llm"]: llm["more_executions"] for llm in summary["llms"]}
    unsure = [llm for llm, more in needed.items() if more is None or more > 0]
    if summary["executions"] < 2:
        found.append("One execution says nothing about how shares vary: trace more.")
    elif unsure:
        more = max(needed[llm] or 0 for llm in unsure)
        found.append(
            f"The shares of {', '.join(unsure)} are not known to ±{PRECISION:.0%}: "
            f"{more:,} more executions like these would bring the last of them there."
        )
    return found


def _timelines(
    executions: Sequence[Execution], timelines: Sequence[Timeline], paths: Sequence[CriticalPath]
) -> list[dict[str, Any]]:
    """Up to 200 executions, evenly from the shortest to the longest, with their spans as rows."""
    order = sorted(range(len(executions)), key=lambda index: paths[index].makespan_s)
    if len(order) > _SHOWN_EXECUTIONS:
        picked = np.linspace(0, len(order) - 1, _SHOWN_EXECUTIONS).round().astype(int)
        order = [order[place] for place in picked]
    found = []
    for index in order:
        execution = executions[index]
        critical = {timelines[index].span_ids[call] for call in paths[index].calls}
        shown = execution.spans[:_SHOWN_SPANS]
        rows = {span.id: row for row, span in enumerate(shown)}
        found.append(
            {
                "id": execution.id,
                "workflow": execution.workflow,
                "makespan_s": paths[index].makespan_s,
                "left_out": len(execution.spans) - len(shown),
                "spans": [_span_row(span, rows, critical=span.id in critical) for span in shown],
            }
        )
    return found


def _span_row(span: Span, rows: Mapping[str, int], *, critical: bool) -> list[Any]:
    """Parent's row, kind, name, start, end; for a call also LLM, role, tokens in and out, whether it is critical."""
    parent = -1 if span.parent is None else rows[span.parent]
    row: list[Any] = [parent, span.kind, span.name, round(span.start_s, 6), round(span.end_s, 6)]
    if span.call is not None:
        row += [span.call.llm, span.call.role, span.call.input_tokens, span.call.output_tokens, critical]
    return row

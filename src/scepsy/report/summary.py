"""All that a report says, as plain values: what `--json` prints and the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from scepsy.traces import Reading, Tally
from scepsy_optimizer.executions import Execution, Span
from scepsy_optimizer.timeline import CriticalPath, Timeline
from scepsy_optimizer.totals import FlowTotals, Peak, Sum, Totals
from scepsy_optimizer.workload import LLMDemand, Workload

FORMAT: Final = "scepsy-report/1"
PRECISION: Final = 0.1
"""The relative half width of a share's interval that the report counts executions for."""

_SHOWN_EXECUTIONS = 200
_SHOWN_SPANS = 2000
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 24

_Floats = NDArray[np.float64]


def summarise(
    account: Tally | Reading, totals: Totals, workload: Workload, *, timelines: bool = True
) -> dict[str, Any]:
    """The report on the totals of executions and their workload (`workload_of(totals)`), ready to be written as JSON.

    `account` says what was read and what was left out. Quantiles and histograms are those of the sample, which holds
    all executions where there are not too many; everything else is of all. `timelines` adds the spans of up to 200
    executions of the sample, from the shortest to the longest, for drawing.
    """
    paths = [timeline.critical_path(timeline.traced_s) for timeline in workload.timelines]
    mixture = _Mixture(totals, workload)
    summary: dict[str, Any] = {
        "format": FORMAT,
        "executions": totals.executions,
        "sampled": len(workload.timelines),
        "calls": totals.calls,
        "spans": account.spans,
        "files": account.files,
        "latency_s": workload.latency_s,
        "latency_cv": workload.latency_cv,
        "tool_s": workload.tool_s,
        "workflows": _workflows(totals, workload, paths),
        "llms": [_llm(demand, mixture, workload) for demand in workload.demands],
        "roles": _roles(mixture),
        "critical_path_s": {
            "llms": {demand.llm: mixture.mean(Sum.CRITICAL_NS, demand.llm) / 1e9 for demand in workload.demands},
            "outside_llms": mixture.mean(Sum.FIXED_NS) / 1e9,
        },
        "transitions": _transitions(mixture),
        "queueing": _queueing(totals),
        "dropped": dict(sorted(account.dropped.items())),
        "repaired": dict(sorted(account.repaired.items())),
    }
    if timelines:
        summary["timelines"] = _timelines(totals.sampled, workload.timelines, paths)
    return summary


def executions_needed(demand: LLMDemand, executions: int) -> int | None:
    """How many more executions would bring the share's 95 % interval to ±10 % of the share, 0 if it is there.

    The width falls with the square root of the number. None where the share is 0 or there is one execution only.
    """
    if demand.share <= 0 or executions < 2:
        return None
    relative = (demand.share_high - demand.share_low) / 2 / demand.share
    return max(0, math.ceil(executions * (relative / PRECISION) ** 2) - executions)


class _Mixture:
    """Totals of several workflows, of which each counts as much as in the workload."""

    def __init__(self, totals: Totals, workload: Workload) -> None:
        weights = dict.fromkeys(totals.workflows, 0.0)
        for timeline, weight in zip(workload.timelines, workload.weights, strict=True):
            weights[timeline.workflow] += weight
        self._flows = [(flow, weights[name] / flow.sum(Sum.EXECUTIONS)) for name, flow in totals.workflows.items()]

    def mean(self, what: Sum, *names: str) -> float:
        """Mean over executions of what was added up."""
        return sum(weight * flow.sum(what, *names) for flow, weight in self._flows)

    def named(self, what: Sum) -> list[tuple[str, ...]]:
        """The names under which there is such a sum in any workflow, sorted."""
        return sorted({names for flow, _ in self._flows for names in flow.named(what)})


def _llm(demand: LLMDemand, mixture: _Mixture, workload: Workload) -> dict[str, Any]:
    llm = demand.llm
    found = [
        (traced_s, weight)
        for timeline, weight in zip(workload.timelines, workload.weights, strict=True)
        for call, traced_s in zip(timeline.calls, timeline.traced_s, strict=True)
        if call.llm == llm
    ]
    visits = [float(sum(call.llm == llm for call in timeline.calls)) for timeline in workload.timelines]
    return {
        "llm": llm,
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
        "call_s": _distribution(
            mixture.mean(Sum.CALL_NS, llm) / mixture.mean(Sum.CALLS, llm) / 1e9,
            [duration_s for duration_s, _ in found],
            [weight for _, weight in found],
        ),
        "visits_distribution": _distribution(demand.visits, visits, workload.weights),
    }


def _distribution(mean: float, values: Sequence[float], weights: Sequence[float]) -> dict[str, Any]:
    """Quantiles and a histogram of sampled values, beside the mean of all; a sample may have missed all of a few."""
    found = np.array(values if values else [mean])
    parts = np.array(weights if values else [1.0])
    even = bool((parts == parts[0]).all())
    counts, edges = np.histogram(
        found, bins=min(_BINS, max(1, len(np.unique(found)))), weights=None if even else parts / parts.mean()
    )
    levels = np.quantile(found, _QUANTILES) if even else _weighted_quantiles(found, parts)
    return {
        "mean": mean,
        "quantiles": {f"{level:g}": float(value) for level, value in zip(_QUANTILES, levels, strict=True)},
        "low": float(edges[0]),
        "high": float(edges[-1]),
        "counts": counts.tolist(),
    }


def _weighted_quantiles(values: _Floats, weights: _Floats) -> _Floats:
    """The smallest values that at least that part of the weight does not exceed."""
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    places = np.searchsorted(below, np.array(_QUANTILES) * below[-1])
    found: _Floats = values[order[np.minimum(places, len(order) - 1)]]
    return found


def _workflows(totals: Totals, workload: Workload, paths: Sequence[CriticalPath]) -> list[dict[str, Any]]:
    makespans: dict[str, list[float]] = {name: [] for name in totals.workflows}
    for timeline, path in zip(workload.timelines, paths, strict=True):
        makespans[timeline.workflow].append(path.makespan_s)
    return [
        _workflow(name, flow, makespans[name])
        for name, flow in sorted(totals.workflows.items(), key=lambda item: (-item[1].sum(Sum.EXECUTIONS), item[0]))
    ]


def _workflow(name: str, flow: FlowTotals, makespans_s: Sequence[float]) -> dict[str, Any]:
    number = flow.sum(Sum.EXECUTIONS)
    total_ns = flow.sum(Sum.MAKESPAN_NS)
    # Whole numbers: nothing is lost by taking the square of the sum from the sum of the squares.
    deviation_ns = math.sqrt((number * flow.sum(Sum.MAKESPAN_NS_SQUARED) - total_ns**2) / (number * max(1, number - 1)))

    def mean(what: Sum) -> float:
        return flow.sum(what) / number

    return {
        "workflow": name,
        "executions": number,
        "latency_s": _distribution(total_ns / number / 1e9, makespans_s, [1.0] * len(makespans_s)),
        "latency_cv": deviation_ns * number / total_ns if total_ns > 0 else 0.0,
        "tool_s": mean(Sum.FIXED_NS) / 1e9,
        "calls": sum(flow.sum(Sum.CALLS, *names) for names in flow.named(Sum.CALLS)) / number,
        "width": {"mean": mean(Sum.WIDTH), "max": flow.peak(Peak.WIDTH)},
        "depth": {"mean": mean(Sum.DEPTH), "max": flow.peak(Peak.DEPTH)},
        "recursion": flow.peak(Peak.RECURSION),
        "rounds": {"mean": mean(Sum.ROUNDS), "max": flow.peak(Peak.ROUNDS)},
    }


def _roles(mixture: _Mixture) -> list[dict[str, Any]]:
    """Each LLM's calls by what they were made for, in the order of falling share."""
    names = mixture.named(Sum.ROLE_CALLS)
    together = sum(mixture.mean(Sum.ROLE_SERVICE_NS, *name) for name in names)
    found = []
    for llm, role in names:
        visits = mixture.mean(Sum.ROLE_CALLS, llm, role)
        spent = mixture.mean(Sum.ROLE_SERVICE_NS, llm, role)
        found.append(
            {
                "llm": llm,
                "role": role,
                "visits": visits,
                "input_tokens": mixture.mean(Sum.ROLE_INPUT_TOKENS, llm, role) / visits,
                "output_tokens": mixture.mean(Sum.ROLE_OUTPUT_TOKENS, llm, role) / visits,
                "share": spent / together if together > 0 else 0.0,
            }
        )
    return sorted(found, key=lambda role: -role["share"])


def _transitions(mixture: _Mixture) -> list[dict[str, Any]]:
    """How often, in a mean execution, a call waits for another: from one (LLM, role) to the next; None is the start."""
    starts = [
        {"from": None, "to": list(name), "per_execution": mixture.mean(Sum.STARTS, *name)}
        for name in mixture.named(Sum.STARTS)
    ]
    between = [
        {"from": list(name[:2]), "to": list(name[2:]), "per_execution": mixture.mean(Sum.TRANSITIONS, *name)}
        for name in mixture.named(Sum.TRANSITIONS)
    ]
    return sorted(starts + between, key=lambda edge: -edge["per_execution"])


def _queueing(totals: Totals) -> dict[str, Any]:
    """How much of the calls' time is known to be queueing, and for which part of the calls that is known."""

    def together(what: Sum) -> int:
        return sum(flow.sum(what) for flow in totals.workflows.values())

    busy_ns = together(Sum.KNOWN_QUEUE_CALL_NS)
    return {
        "known_part": together(Sum.KNOWN_QUEUE_CALLS) / totals.calls,
        "part_of_time": together(Sum.QUEUE_NS) / busy_ns if busy_ns > 0 else None,
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
    if summary["sampled"] < summary["executions"]:
        found.append(
            f"Quantiles, histograms and timelines are of a random sample of {summary['sampled']:,} executions; "
            "everything else is of all of them."
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

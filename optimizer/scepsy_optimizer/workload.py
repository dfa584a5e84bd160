"""The workload: what a mean execution asks of each LLM, with its uncertainty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Execution, Span
from scepsy_optimizer.shape import bursts_of
from scepsy_optimizer.timeline import Timeline, compile_timeline

_LEAST_S = 0.5e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMDemand:
    """What the executions ask of one LLM. Means are over executions, token counts per call.

    `visits` is the visit ratio, calls per execution, and `visits_by_role` splits it. `parallelism` is the LLM's service
    time over the time that at least one of its calls runs; `overlap` is how many of its calls run, on average, while
    one of them runs, that one included (each within one execution). `longest_tokens` is the
    largest context of a call, `context_tokens` the mean context of a token being decoded, `prompt_pairs` the mean of
    input^2 - cached^2 tokens (what attention computes for a prompt), `output_cv` the coefficient of variation of the
    output tokens; 0 where these are not known. `burst` is how many calls of one execution start at once, on average as
    a call sees it, itself included; `beside_tokens` are the computed prompt tokens of the others, on average over such
    bursts. `service_s` is the service demand: time of its calls per execution,
    without what is known to be queueing. `share` is its part of all LLMs' service time, sum over
    executions by sum over executions, with the 95 % bootstrap interval; `share_cv` is the coefficient of variation of
    the share among executions. `critical_visits` counts its calls on the critical path, as traced.
    """

    llm: str
    visits: float
    visits_by_role: Mapping[str, float]
    parallelism: float
    overlap: float
    input_tokens: float
    cached_tokens: float
    output_tokens: float
    longest_tokens: int
    service_s: float
    share: float
    share_low: float
    share_high: float
    share_cv: float
    critical_visits: float
    context_tokens: float = 0.0
    prompt_pairs: float = 0.0
    output_cv: float = 0.0
    burst: float = 1.0
    beside_tokens: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The aggregate of a set of executions, of one workflow or of a mix.

    `workflows` counts the executions by workflow. `latency_s` and `latency_cv` are the mean makespan and its
    coefficient of variation, `tool_s` the mean part of the critical path that no LLM spends. `timelines` are the
    executions themselves, or a sample of very many, for retiming; `weights`, which add up to 1, say how much each
    counts in every mean.
    """

    workflows: Mapping[str, int]
    latency_s: float
    latency_cv: float
    tool_s: float
    demands: tuple[LLMDemand, ...]
    timelines: tuple[Timeline, ...]
    weights: tuple[float, ...]

    @property
    def executions(self) -> int:
        """Number of executions that were aggregated."""
        return sum(self.workflows.values())

    def demand(self, llm: str) -> LLMDemand:
        """The demand for one LLM. Raises ScepsyError if no call names it."""
        for demand in self.demands:
            if demand.llm == llm:
                return demand
        raise ScepsyError(f"workload: no call of {llm!r}; the traces call {', '.join(d.llm for d in self.demands)}")


def aggregate(
    executions: Iterable[Execution],
    *,
    rates_rps: Mapping[str, float] | None = None,
    rng: np.random.Generator | None = None,
    resamples: int = 1000,
) -> Workload:
    """Aggregate executions to a workload; LLMs come in the order of falling share.

    All executions count alike, or, with `rates_rps`, each workflow counts by its rate, however often it was traced.
    `rng` drives the bootstrap of the share intervals (a generator with a fixed seed by default, so that the same
    executions give the same workload). Raises ScepsyError without any execution, without any call, or where `rates_rps`
    does not name the traced workflows.
    """
    runs = list(executions)
    if not runs:
        raise ScepsyError("no executions to aggregate: trace the workflow at least once")
    timelines = tuple(compile_timeline(run) for run in runs)
    llms = sorted({call.llm for timeline in timelines for call in timeline.calls})
    if not llms:
        raise ScepsyError(f"none of the {len(runs)} executions calls an LLM: is the capture of LLM calls turned on?")
    workflows = Counter(run.workflow for run in runs)
    weight_of = weights_of_workflows(workflows, rates_rps)
    weights = np.array([weight_of[run.workflow] for run in runs])
    service = _service_times(timelines, llms)
    shares, low, high = _shares(service, weights, rng or np.random.default_rng(0), resamples)
    paths = [timeline.critical_path(timeline.traced_s) for timeline in timelines]
    critical = dict.fromkeys(llms, 0.0)
    for timeline, path, weight in zip(timelines, paths, weights, strict=True):
        for index in path.calls:
            critical[timeline.calls[index].llm] += float(weight)
    makespans = np.array([path.makespan_s for path in paths])
    latency_s = float(weights @ makespans)
    demands = [
        _demand(
            llm,
            runs,
            weights,
            service=service[:, column],
            totals=service.sum(axis=1),
            share=(shares[column], low[column], high[column]),
            critical_visits=critical[llm],
        )
        for column, llm in enumerate(llms)
    ]
    return Workload(
        workflows=dict(workflows),
        latency_s=latency_s,
        latency_cv=_cv(makespans, weights),
        tool_s=float(weights @ np.array([path.fixed_s for path in paths])),
        demands=tuple(sorted(demands, key=lambda demand: (-demand.share, demand.llm))),
        timelines=timelines,
        weights=tuple(weights.tolist()),
    )


def weights_of_workflows(executions: Mapping[str, int], rates_rps: Mapping[str, float] | None) -> Mapping[str, float]:
    """What each execution of a workflow counts, given how many there are of each; over all executions it adds up to 1.

    Raises ScepsyError where `rates_rps` does not name the same workflows.
    """
    if rates_rps is None:
        number = sum(executions.values())
        return dict.fromkeys(executions, 1 / number)
    if rates_rps.keys() != executions.keys():
        raise ScepsyError(
            f"rates are given for {', '.join(sorted(rates_rps))}, the traces hold {', '.join(sorted(executions))}: "
            "give each traced workflow a rate"
        )
    if not all(0 < rate < float("inf") for rate in rates_rps.values()):
        raise ScepsyError("the rate of each workflow must be a positive number of executions per second")
    together = sum(rates_rps.values())
    return {workflow: rates_rps[workflow] / number / together for workflow, number in executions.items()}


def _demand(
    llm: str,
    runs: Sequence[Execution],
    weights: NDArray[np.float64],
    *,
    service: NDArray[np.float64],
    totals: NDArray[np.float64],
    share: tuple[float, float, float],
    critical_visits: float,
) -> LLMDemand:
    per_run = [[span for span in run.calls if span.call is not None and span.call.llm == llm] for run in runs]
    calls = [
        (span.call, float(weight))
        for found, weight in zip(per_run, weights, strict=True)
        for span in found
        if span.call is not None
    ]
    visits = sum(weight for _, weight in calls)
    roles: dict[str, float] = {}
    for call, weight in calls:
        roles[call.role] = roles.get(call.role, 0.0) + weight
    parallelism, overlap = _concurrency(per_run, weights)
    busy = totals > 0
    counts = np.array([(call.input_tokens, call.cached_tokens, call.output_tokens) for call, _ in calls], dtype=float)
    inputs, cached, outputs = counts.T
    parts = np.array([weight for _, weight in calls]) / visits
    decoded = parts * np.maximum(1.0, outputs)
    bursts = [(bursts_of(found), weight) for found, weight in zip(per_run, weights.tolist(), strict=True)]
    return LLMDemand(
        llm=llm,
        visits=visits,
        visits_by_role=dict(sorted(roles.items())),
        parallelism=parallelism,
        overlap=overlap,
        input_tokens=sum(weight * call.input_tokens for call, weight in calls) / visits,
        cached_tokens=sum(weight * call.cached_tokens for call, weight in calls) / visits,
        output_tokens=sum(weight * call.output_tokens for call, weight in calls) / visits,
        longest_tokens=max(call.input_tokens + call.output_tokens for call, _ in calls),
        service_s=float(weights @ service),
        share=share[0],
        share_low=share[1],
        share_high=share[2],
        share_cv=_cv(service[busy] / totals[busy], weights[busy]) if busy.any() else 0.0,
        critical_visits=critical_visits,
        context_tokens=float(decoded @ (inputs + outputs / 2) / decoded.sum()),
        prompt_pairs=float(parts @ (inputs**2 - cached**2)),
        output_cv=_cv(outputs, parts),
        burst=sum(one.squares * weight for one, weight in bursts) / visits,
        beside_tokens=sum(one.beside_tokens * weight for one, weight in bursts)
        / sum(one.number * weight for one, weight in bursts),
    )


def _service_times(timelines: Sequence[Timeline], llms: Sequence[str]) -> NDArray[np.float64]:
    """Service time of each LLM (columns) in each execution (rows)."""
    columns = {llm: column for column, llm in enumerate(llms)}
    service = np.zeros((len(timelines), len(llms)))
    for row, timeline in enumerate(timelines):
        for call, traced_s in zip(timeline.calls, timeline.traced_s, strict=True):
            served_s = traced_s - (call.queue_s or 0.0)
            # Traces know whole nanoseconds: less than that is what rounding leaves of nothing.
            service[row, columns[call.llm]] += served_s if served_s > _LEAST_S else 0.0
    return service


def _shares(
    service: NDArray[np.float64], weights: NDArray[np.float64], rng: np.random.Generator, resamples: int
) -> tuple[list[float], list[float], list[float]]:
    """Share of each column with its 95 % percentile bootstrap interval over the rows."""
    rows = len(service)
    weighted = service * weights[:, None]
    sums = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples) @ weighted
    totals = sums.sum(axis=1, keepdims=True)
    samples = np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0)
    total = weighted.sum()
    shares = weighted.sum(axis=0) / total if total > 0 else np.zeros(service.shape[1])
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return shares.tolist(), low.tolist(), high.tolist()


def _concurrency(per_run: Sequence[Sequence[Span]], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Parallelism (service time by busy time) and overlap (as a running call sees it) over all runs."""
    total_s = busy_s = seen_s = 0.0
    for spans, weight in zip(per_run, weights.tolist(), strict=True):
        edges = sorted([(span.start_s, 1) for span in spans] + [(span.end_s, -1) for span in spans])
        running, since_s = 0, 0.0
        for time_s, change in edges:
            if running:
                length_s = (time_s - since_s) * weight
                busy_s += length_s
                total_s += running * length_s
                seen_s += running * running * length_s
            running += change
            since_s = time_s
    if busy_s == 0:
        return 1.0, 1.0
    return total_s / busy_s, seen_s / total_s


def _cv(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Weighted coefficient of variation, without the bias of small samples; 0 for fewer than two values."""
    count = len(values)
    mean = float(np.average(values, weights=weights)) if count else 0.0
    if count < 2 or mean <= 0:
        return 0.0
    variance = float(np.average((values - mean) ** 2, weights=weights)) * count / (count - 1)
    return float(np.sqrt(variance)) / mean

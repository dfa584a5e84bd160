"""The Aggregate LLM Pipeline: one stage per LLM, additive, built from the critical paths of the executions.

The mean makespan is a convex, piecewise linear function of the call durations, and a call's duration is linear in its
tokens (`CallSpeed`). Built at some speeds, the pipeline is the tangent there: its coefficients are the LLM's calls,
computed prompt tokens and generated tokens on the mean critical path, its constant is the rest of that path. So it is
exact at those speeds, and a lower bound at all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Call
from scepsy_optimizer.replica import CallShape, CallSpeed
from scepsy_optimizer.timeline import Timeline
from scepsy_optimizer.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """An LLM's part of the mean critical path: calls, computed prompt tokens and generated tokens per execution."""

    llm: str
    calls: float
    input_tokens: float
    output_tokens: float

    def latency_s(self, speed: CallSpeed) -> float:
        """What this stage adds to the mean latency of an execution."""
        return self.calls * speed.fixed_s + self.input_tokens * speed.input_s + self.output_tokens * speed.output_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Stages plus the time that no LLM spends. `latency_s` at the speeds it was built for is `built_latency_s`."""

    stages: tuple[Stage, ...]
    fixed_s: float
    built_latency_s: float

    def latency_s(self, speeds: Mapping[str, CallSpeed]) -> float:
        """Mean latency of an execution, each LLM at its speed: a lower bound away from the speeds it was built at."""
        return self.fixed_s + sum(stage.latency_s(speeds[stage.llm]) for stage in self.stages)


def build_pipeline(workload: Workload, speeds: Mapping[str, CallSpeed] | None = None) -> Pipeline:
    """The pipeline at given speeds of each LLM, or as traced where no speeds are given.

    Raises ScepsyError where an LLM of the workload has no speed.
    """
    if speeds is not None:
        _require(workload, speeds)
    calls: dict[str, list[float]] = {demand.llm: [0.0, 0.0, 0.0] for demand in workload.demands}
    fixed_s = latency_s = 0.0
    for timeline, weight in zip(workload.timelines, workload.weights, strict=True):
        durations_s = timeline.traced_s if speeds is None else call_durations_s(timeline, speeds)
        path = timeline.critical_path(durations_s)
        fixed_s += weight * path.fixed_s
        latency_s += weight * path.makespan_s
        for index in path.calls:
            call = timeline.calls[index]
            computed, generated = counted_tokens(call)
            totals = calls[call.llm]
            totals[0] += weight
            totals[1] += weight * computed
            totals[2] += weight * generated
    return Pipeline(
        stages=tuple(
            Stage(llm=llm, calls=totals[0], input_tokens=totals[1], output_tokens=totals[2])
            for llm, totals in calls.items()
        ),
        fixed_s=fixed_s,
        built_latency_s=latency_s,
    )


def call_durations_s(timeline: Timeline, speeds: Mapping[str, CallSpeed]) -> list[float]:
    """Duration of each call of an execution with its own token counts, never below 0."""
    return [max(0.0, speeds[call.llm].call_s(*counted_tokens(call))) for call in timeline.calls]


def workflow_latencies_s(workload: Workload, speeds: Mapping[str, CallSpeed]) -> dict[str, float]:
    """Mean makespan of each workflow of the workload at the given speeds."""
    _require(workload, speeds)
    sums = dict.fromkeys(workload.workflows, 0.0)
    numbers = dict.fromkeys(workload.workflows, 0)
    for timeline in workload.timelines:
        sums[timeline.workflow] += timeline.makespan_s(call_durations_s(timeline, speeds))
        numbers[timeline.workflow] += 1
    return {workflow: total / numbers[workflow] for workflow, total in sums.items()}


def paper_latency_s(workload: Workload, speeds: Mapping[str, CallSpeed]) -> float:
    """The paper's own formula, as a baseline: sum over LLMs of mean call time * visits / parallelism.

    Source: arXiv 2604.15186, the Aggregate LLM Pipeline. Tool time does not appear in it, and LLMs never overlap.
    """
    _require(workload, speeds)
    total_s = 0.0
    for demand in workload.demands:
        shape = CallShape.of(demand)
        call_s = speeds[demand.llm].call_s(shape.computed_tokens, shape.generated_tokens)
        total_s += call_s * demand.visits / demand.parallelism
    return total_s


def counted_tokens(call: Call) -> tuple[int, int]:
    """Computed prompt tokens and generated tokens of one call, as an engine counts them: at least one each."""
    return max(1, call.input_tokens - call.cached_tokens), max(1, call.output_tokens)


def _require(workload: Workload, speeds: Mapping[str, CallSpeed]) -> None:
    missing: Sequence[str] = [demand.llm for demand in workload.demands if demand.llm not in speeds]
    if missing:
        raise ScepsyError(f"no speed for {', '.join(missing)}: the workload calls them")

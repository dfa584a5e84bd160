"""What replays of a plan gave, beside what was predicted, as tables for a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from scepsy.report.tables import plain_table
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import plan_choices, predict
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.replications import Estimate, Replications
from scepsy_optimizer.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What replays gave, and the mean latency that is predicted for the same; None where no finite one is."""

    replayed: Replications
    predicted_s: float | None


def predicted_s(plan: Plan, workload: Workload, profiles: Profiles, rate_rps: float) -> float | None:
    """The mean latency that the pipeline predicts for the plan's allocation at that rate."""
    choices = {llm: groups for llm, groups in plan_choices(plan).items() if llm in profiles}
    prediction = predict(workload, profiles, plan.cluster, choices, rate_rps=rate_rps).prediction
    return prediction.latency_s if prediction is not None and prediction.latency_s < float("inf") else None


def latency_table(found: Comparison) -> Table:
    """Mean and percentiles with their intervals, and the predicted mean."""
    replayed = found.replayed
    table = plain_table(
        f"{replayed.runs} replays of {replayed.executions:,} executions at {replayed.rate_rps:g}/s",
        caption="± half the width of the 95 % interval over the replays" if replayed.runs > 1 else None,
    )
    table.add_column("latency of an execution", no_wrap=True)
    for column in ("seconds", "±", "predicted"):
        table.add_column(column, justify="right", no_wrap=True)
    predicted = "beyond saturation" if found.predicted_s is None else f"{found.predicted_s:.2f}"
    for name, estimate, beside in (
        ("mean", replayed.mean_s, predicted),
        ("50th percentile", replayed.p50_s, ""),
        ("95th percentile", replayed.p95_s, ""),
        ("99th percentile", replayed.p99_s, ""),
    ):
        table.add_row(name, f"{estimate.value:.2f}", _width(estimate), beside)
    return table


def _width(estimate: Estimate) -> str:
    return f"{estimate.half_width:.2f}" if estimate.half_width else ""


def use_table(plan: Plan, found: Comparison) -> Table:
    """How busy the replicas of each LLM were, and what waited for them."""
    table = plain_table("what the replicas of each LLM did")
    table.add_column("LLM", no_wrap=True)
    for column in ("replicas", "busy", "running", "waiting", "preempted"):
        table.add_column(column, justify="right", no_wrap=True)
    for use in found.replayed.uses:
        table.add_row(
            escape(use.llm),
            str(sum(part.replicas for part in plan.parts(use.llm))),
            f"{use.busy:.0%}",
            f"{use.running:.1f}",
            f"{use.waiting:.1f}",
            f"{use.preemptions:,}",
        )
    return table

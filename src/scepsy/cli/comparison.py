"""What replays of a plan gave, beside what was predicted, as tables for a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from scepsy.report.tables import plain_table
from scepsy_optimizer.percentiles import PredictedLatencies
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.replications import Estimate, Replications


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What replays gave, and the latencies that are predicted for the same; None where no finite ones are.

    `predicted_s` is the mean of `predicted`.
    """

    replayed: Replications
    predicted_s: float | None
    predicted: PredictedLatencies | None


def latency_table(found: Comparison) -> Table:
    """Mean and percentiles with their intervals, beside those that are predicted."""
    replayed = found.replayed
    table = plain_table(
        f"{replayed.runs} replays of {replayed.executions:,} executions at {replayed.rate_rps:g}/s",
        caption="± half the width of the 95 % interval over the replays" if replayed.runs > 1 else None,
    )
    table.add_column("latency of an execution", no_wrap=True)
    for column in ("seconds", "±", "predicted"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, column in (
        ("mean", "mean_s"),
        ("50th percentile", "p50_s"),
        ("95th percentile", "p95_s"),
        ("99th percentile", "p99_s"),
    ):
        estimate: Estimate = getattr(replayed, column)
        predicted = f"{getattr(found.predicted, column):.2f}" if found.predicted else "beyond saturation"
        table.add_row(name, f"{estimate.value:.2f}", _width(estimate), predicted)
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

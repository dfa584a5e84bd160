"""`scepsy replay`: traced executions through a plan's engines, event by event, beside what was predicted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scepsy.cli.options import add_profiles, parse_models
from scepsy.files import load_plan
from scepsy.inputs import resolve_cluster_profiles
from scepsy.planning import aggregate
from scepsy.report.progress import LateProgress
from scepsy.report.tables import plain_table
from scepsy.traces import read_executions
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Execution
from scepsy_optimizer.percentiles import PredictedLatencies, predict_latencies
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.replications import Estimate, Replications, recorded_rate_rps, replay_often, replay_recorded

HELP = "replay traced executions on a plan, event by event: latencies with intervals, queues, beside the prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What replays gave, and the latencies that are predicted for the same; None where no finite ones are.

    `predicted_s` is the mean of `predicted`.
    """

    replayed: Replications
    predicted_s: float | None
    predicted: PredictedLatencies | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("plan", metavar="PLAN", help="plan file")
    parser.add_argument("traces", nargs="+", metavar="TRACES", help="trace files, or directories of them")
    parser.add_argument("--rate", type=float, metavar="RATE", help="executions per second (default: the plan's)")
    parser.add_argument(
        "--executions", type=int, metavar="N", help="that many in each run (default: until it is steady)"
    )
    parser.add_argument("--runs", type=int, metavar="N", help="with other arrivals each (default: 5)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the first run's arrivals (default: 0)")
    parser.add_argument(
        "--recorded",
        action="store_true",
        help="one run, each execution at its recorded start instead of Poisson arrivals; --rate makes that faster",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    add_profiles(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Replay, compare, show."""
    plan = load_plan(args.plan)
    recorded = _recorded(args) if args.recorded else []
    rate_rps = _rate_rps(args, plan, recorded)
    if args.seed is not None and args.seed < 0:
        raise ScepsyError(f"--seed {args.seed}: give a number that is not negative")
    workload = aggregate(args.traces)
    for demand in workload.demands:
        plan.parts(demand.llm)
    profiles = resolve_cluster_profiles(
        [demand.llm for demand in workload.demands],
        plan.cluster,
        profiles=args.profiles,
        models=parse_models(args.model),
    )
    predicted = predict_latencies(plan, workload, profiles, rate_rps=rate_rps)
    runs = 5 if args.runs is None else args.runs
    with LateProgress("replaying", Console(stderr=True)) as progress:
        if args.recorded:
            replayed = replay_recorded(plan, profiles, recorded, rate_rps=rate_rps)
        else:
            replayed = replay_often(
                plan,
                profiles,
                workload,
                rate_rps=rate_rps,
                latency_s=predicted.mean_s if predicted else workload.latency_s,
                seeds=range(args.seed or 0, (args.seed or 0) + runs),
                executions=args.executions,
                on_run=lambda done: progress(done / runs),
            )
    found = Comparison(replayed=replayed, predicted_s=predicted.mean_s if predicted else None, predicted=predicted)
    if args.json:
        print(TypeAdapter(Comparison).dump_json(found).decode())
        return 0
    console.print(_latency_table(found))
    console.print(_use_table(plan, found))
    return 0


def _recorded(args: argparse.Namespace) -> list[Execution]:
    """The executions themselves, with their starts, of those that call an LLM."""
    drawn = {"--runs": args.runs, "--seed": args.seed, "--executions": args.executions}
    if given := [option for option, value in drawn.items() if value is not None]:
        raise ScepsyError(f"--recorded replays every execution once, as it was traced: leave out {', '.join(given)}")
    return [execution for execution in read_executions(args.traces).executions if execution.calls]


def _rate_rps(args: argparse.Namespace, plan: Plan, recorded: Sequence[Execution]) -> float:
    if args.rate is not None:
        if not 0 < args.rate < float("inf"):
            raise ScepsyError("--rate: above 0")
        return float(args.rate)
    if args.recorded:
        return recorded_rate_rps(recorded)
    if not plan.rate_rps > 0:
        raise ScepsyError(f"{args.plan} is for no rate: give one with --rate")
    return plan.rate_rps


def _latency_table(found: Comparison) -> Table:
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


def _use_table(plan: Plan, found: Comparison) -> Table:
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

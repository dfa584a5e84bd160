"""`scepsy replay`: traced executions through a plan's engines, event by event, beside what was predicted."""

from __future__ import annotations

import argparse
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
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import plan_choices, predict
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.replications import Estimate, Replications, replay_often
from scepsy_optimizer.workload import Workload

HELP = "replay traced executions on a plan, event by event: latencies with intervals, queues, beside the prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What replays gave, and the mean latency that is predicted for the same; None where no finite one is."""

    replayed: Replications
    predicted_s: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("plan", metavar="PLAN", help="plan file")
    parser.add_argument("traces", nargs="+", metavar="TRACES", help="trace files, or directories of them")
    parser.add_argument("--rate", type=float, metavar="RATE", help="executions per second (default: the plan's)")
    parser.add_argument(
        "--executions", type=int, metavar="N", help="that many in each run (default: until it is steady)"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="with other arrivals each (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first run's arrivals (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    add_profiles(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Replay, compare, show."""
    plan = load_plan(args.plan)
    rate_rps = plan.rate_rps if args.rate is None else args.rate
    if not rate_rps > 0:
        raise ScepsyError(
            f"{args.plan} is for no rate: give one with --rate" if args.rate is None else "--rate: above 0"
        )
    if args.seed < 0:
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
    predicted_s = _predicted_s(plan, workload, profiles, rate_rps)
    with LateProgress("replaying", Console(stderr=True)) as progress:
        replayed = replay_often(
            plan,
            profiles,
            workload,
            rate_rps=rate_rps,
            latency_s=workload.latency_s if predicted_s is None else predicted_s,
            seeds=range(args.seed, args.seed + args.runs),
            executions=args.executions,
            on_run=lambda done: progress(done / args.runs),
        )
    found = Comparison(replayed=replayed, predicted_s=predicted_s)
    if args.json:
        print(TypeAdapter(Comparison).dump_json(found).decode())
        return 0
    console.print(_latency_table(found))
    console.print(_use_table(plan, found))
    return 0


def _predicted_s(plan: Plan, workload: Workload, profiles: Profiles, rate_rps: float) -> float | None:
    """The mean latency that the pipeline predicts for the plan's allocation at that rate."""
    choices = {llm: groups for llm, groups in plan_choices(plan).items() if llm in profiles}
    prediction = predict(workload, profiles, plan.cluster, choices, rate_rps=rate_rps).prediction
    return prediction.latency_s if prediction is not None and prediction.latency_s < float("inf") else None


def _latency_table(found: Comparison) -> Table:
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

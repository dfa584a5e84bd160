"""`scepsy replay`: traced executions through a plan's engines, event by event, beside what was predicted."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from scepsy.cli.options import add_json, add_profiles, parse_models
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from rich.console import Console

HELP = "replay traced executions on a plan, event by event: latencies with intervals, queues, beside the prediction"

EXAMPLE = """\
  scepsy replay plan.yaml scepsy-traces               # at the plan's rate
  scepsy replay plan.yaml scepsy-traces --rate 6"""


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
    add_profiles(parser)
    add_json(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Replay, compare, show."""
    from pydantic import TypeAdapter
    from rich.console import Console

    from scepsy.cli.comparison import Comparison, latency_table, predicted_s, use_table
    from scepsy.files import load_plan
    from scepsy.inputs import resolve_cluster_profiles
    from scepsy.planning import aggregate
    from scepsy.report.progress import LateProgress
    from scepsy_optimizer.replications import replay_often

    plan = load_plan(args.plan)
    rate_rps = plan.rate_rps if args.rate is None else args.rate
    if not rate_rps > 0:
        raise ScepsyError(
            f"{args.plan} is for no rate: give one with --rate" if args.rate is None else "--rate: above 0"
        )
    if args.seed < 0:
        raise ScepsyError(f"--seed {args.seed}: give a number that is not negative")
    errors = Console(stderr=True)
    with LateProgress("reading traces", errors) as progress:
        workload = aggregate(args.traces, on_progress=progress)
    for demand in workload.demands:
        plan.parts(demand.llm)
    profiles = resolve_cluster_profiles(
        [demand.llm for demand in workload.demands],
        plan.cluster,
        profiles=args.profiles,
        models=parse_models(args.model),
    )
    mean_s = predicted_s(plan, workload, profiles, rate_rps)
    with LateProgress("replaying", errors) as progress:
        replayed = replay_often(
            plan,
            profiles,
            workload,
            rate_rps=rate_rps,
            latency_s=workload.latency_s if mean_s is None else mean_s,
            seeds=range(args.seed, args.seed + args.runs),
            executions=args.executions,
            on_run=lambda done: progress(done / args.runs),
        )
    found = Comparison(replayed=replayed, predicted_s=mean_s)
    if args.json:
        print(TypeAdapter(Comparison).dump_json(found).decode())
        return 0
    console.print(latency_table(found))
    console.print(use_table(plan, found))
    return 0

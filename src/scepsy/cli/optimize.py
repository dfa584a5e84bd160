"""`scepsy optimize`: from traces to a plan file."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from scepsy.cli.options import add_profiles, add_traces, parse_models, parse_rates
from scepsy.files import save_plan
from scepsy.planning import optimize
from scepsy.report.tables import plan_table

HELP = "find the allocation of least latency for a rate, place it, and write the plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_traces(parser)
    parser.add_argument(
        "--cluster",
        required=True,
        help="such as 8xH100 or 2x8xH100+8xL40S, a cluster file, or auto, local, ray, kubernetes to find it",
    )
    parser.add_argument(
        "--rate",
        action="append",
        metavar="RATE",
        help="executions per second to plan for, as traced; or WORKFLOW=RATE, once for each workflow",
    )
    parser.add_argument(
        "--max-latency",
        type=float,
        metavar="SECONDS",
        help="mean latency to keep within: the highest rate that does, or with --rate the fewest devices that do",
    )
    parser.add_argument("-o", "--output", default="plan.yaml", metavar="FILE", help="default: plan.yaml")
    add_profiles(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Plan, write, show."""
    plan = optimize(
        args.traces,
        cluster=args.cluster,
        rate=parse_rates(args.rate) if args.rate else None,
        max_latency_s=args.max_latency,
        profiles=args.profiles,
        models=parse_models(args.model),
    )
    save_plan(plan, args.output)
    console.print(plan_table(plan))
    console.print(f"written to {args.output}; start it with: scepsy deploy {Path(args.output)}", soft_wrap=True)
    return 0

"""`scepsy optimize`: from traces to a plan file, or to the frontier of what can be had."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from scepsy.cli.options import add_json, add_profiles, add_traces, parse_models, parse_numbers, parse_rates
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from rich.console import Console

    from scepsy.planning import Answer, Question
    from scepsy_optimizer.cluster import Cluster
    from scepsy_optimizer.plan import Plan
    from scepsy_optimizer.requirements import Requirements

HELP = "find the allocation of least latency for a rate, place it, and write the plan"

EXAMPLE = """\
  scepsy optimize scepsy-traces --cluster 8xH100 --rate 4 --html plan.html
  scepsy optimize scepsy-traces --cluster auto --max-latency 6 --percentile 95
  scepsy optimize scepsy-traces --cluster 2x8xH100 --frontier
  scepsy optimize scepsy-traces --cluster 4xH100 --rate 2 --model writer=Qwen/Qwen3-32B"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_traces(parser)
    parser.add_argument(
        "--cluster",
        required=True,
        help="such as 8xH100 or 2x8xH100+8xL40S, a cluster file, or auto, local, ray, kubernetes to find it",
    )
    add_profiles(parser)
    asked = parser.add_argument_group("what is asked for")
    asked.add_argument(
        "--rate",
        action="append",
        metavar="RATE",
        help="executions per second to plan for, as traced; or WORKFLOW=RATE, once for each workflow; or max",
    )
    asked.add_argument(
        "--max-latency",
        type=float,
        metavar="SECONDS",
        help="latency to keep within: the highest rate that does, or with a --rate the fewest devices that do",
    )
    asked.add_argument(
        "--percentile",
        type=int,
        metavar="P",
        help="--max-latency is on this percentile of a replay (50, 95 or 99), not on the mean",
    )
    asked.add_argument(
        "--frontier",
        action="store_true",
        help="no plan: which latencies, rates and numbers of devices can be had together",
    )
    asked.add_argument(
        "--robust",
        type=float,
        metavar="QUANTILE",
        help="plan for this quantile of every LLM's load, such as 0.9, as far as the traces leave it open",
    )
    respected = parser.add_argument_group("what the plan must respect")
    respected.add_argument(
        "--requirements", metavar="FILE", help="limits and fixed parts of LLMs, weights and limits of workflows"
    )
    respected.add_argument("--plan", metavar="OLD", help="the plan that runs: replicas stay in place where they can")
    respected.add_argument(
        "--keep", action="append", default=[], metavar="LLM", help="give it exactly what it has in the old plan"
    )
    respected.add_argument("--spread", action="store_true", help="replicas of an LLM on different nodes")
    respected.add_argument("--max-nodes", type=int, metavar="N", help="the whole plan on at most so many nodes")
    respected.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="WORKFLOW=NUMBER",
        help="how much a second of its executions counts (default: 1)",
    )
    respected.add_argument(
        "--limit", action="append", default=[], metavar="WORKFLOW=SECONDS", help="limit on its mean latency"
    )
    shown = parser.add_argument_group("what is told")
    shown.add_argument("--what-if", action="store_true", help="what one device more and one less would change")
    shown.add_argument("--html", metavar="FILE", help="write a self-contained page of the plan as well")
    add_json(shown)
    shown.add_argument("-o", "--output", default="plan.yaml", metavar="FILE", help="default: plan.yaml")


def run(args: argparse.Namespace, console: Console) -> int:
    """Plan, write, show."""
    from rich.console import Console

    from scepsy.files import load_plan, require_writable, save_plan
    from scepsy.inputs import resolve_cluster
    from scepsy.planning import answer, describe_account, prepare
    from scepsy.report.progress import LateProgress, waiting

    for target in (args.output, args.html):
        if target:
            require_writable(target)
    old = load_plan(args.plan) if args.plan else None
    cluster = resolve_cluster(args.cluster)
    errors = Console(stderr=True)
    with LateProgress("reading traces", errors) as progress:
        question = prepare(
            args.traces,
            cluster=cluster,
            rate=parse_rates(args.rate) if args.rate else None,
            requirements=_requirements(args, old, cluster),
            profiles=args.profiles,
            models=parse_models(args.model),
            on_progress=progress,
        )
    if question.account is not None and (losses := describe_account(question.account)):
        errors.print(f"traces: {losses}", soft_wrap=True, markup=False, highlight=False)
    if args.frontier:
        return _show_frontier(args, question, console)
    # Only a search for a limit knows how far it is.
    bisects = args.max_latency is not None
    with LateProgress("searching", errors) if bisects else waiting("searching", errors) as told:
        found = answer(
            question,
            max_latency_s=args.max_latency,
            percentile=args.percentile,
            robust=args.robust,
            what_if=args.what_if,
            old=old,
            on_progress=told,
        )
    save_plan(found.plan, args.output)
    if args.html:
        _write_page(args, question, found.plan)
    if args.json:
        from pydantic import TypeAdapter

        from scepsy.planning import Answer

        print(TypeAdapter(Answer).dump_json(found).decode())
    else:
        _show(args, found, old, console)
    return 0


def _show(args: argparse.Namespace, found: Answer, old: Plan | None, console: Console) -> None:
    from scepsy.cli.answers import (
        changes_table,
        describe_moves_from,
        describe_robustness,
        next_devices_table,
        shares_table,
    )
    from scepsy.report.tables import plan_table

    console.print(plan_table(found.plan))
    if found.robustness is not None:
        console.print(describe_robustness(found.plan, found.robustness), soft_wrap=True, markup=False, highlight=False)
    if found.shares:
        console.print(shares_table(found.shares))
    if found.changes:
        console.print(changes_table(found.plan, found.changes))
        console.print(next_devices_table(found.plan, found.next_devices))
    if old is not None:
        console.print(describe_moves_from(args.plan, old, found.plan), soft_wrap=True, markup=False, highlight=False)
    pages = f" and {args.html}" if args.html else ""
    console.print(f"written to {args.output}{pages}; start it with: scepsy deploy {args.output}", soft_wrap=True)


def _write_page(args: argparse.Namespace, question: Question, plan: Plan) -> None:
    from rich.console import Console

    from scepsy.planning import explore
    from scepsy.report.plan_page import write_plan_page
    from scepsy.report.progress import LateProgress

    with LateProgress("searching the frontier", Console(stderr=True)) as progress:
        points = explore(question, plan, lambda done, total: progress(done / total))
    write_plan_page(plan, args.html, name=args.output, frontier=points)


def _show_frontier(args: argparse.Namespace, question: Question, console: Console) -> int:
    from pydantic import TypeAdapter
    from rich.console import Console

    from scepsy.cli.answers import frontier_table
    from scepsy.planning import trace_frontier
    from scepsy.report.progress import LateProgress
    from scepsy_optimizer.frontier import FrontierPoint

    given = {
        "--rate": args.rate,
        "--max-latency": args.max_latency,
        "--percentile": args.percentile,
        "--robust": args.robust,
        "--what-if": args.what_if,
        "--html": args.html,
    }
    if others := [name for name, value in given.items() if value]:
        raise ScepsyError(f"--frontier asks for all rates and latencies at once: leave out {', '.join(others)}")
    with LateProgress("searching", Console(stderr=True)) as progress:
        points = trace_frontier(question, lambda done, total: progress(done / total))
    if args.json:
        print(TypeAdapter(tuple[FrontierPoint, ...]).dump_json(points).decode())
    else:
        console.print(frontier_table(points, question.cluster))
    return 0


def _requirements(args: argparse.Namespace, old: Plan | None, cluster: Cluster) -> Requirements:
    """The file's requirements, with those of the command line on top."""
    from scepsy.files import load_requirements
    from scepsy_optimizer.requirements import Requirements, kept

    found = load_requirements(args.requirements) if args.requirements else Requirements()
    llms, workflows = dict(found.llms), dict(found.workflows)
    if args.keep:
        if old is None:
            raise ScepsyError(f"--keep {args.keep[0]}: name the plan that it is in with --plan")
        llms |= {llm: kept(old, llm, cluster) for llm in args.keep}
    for workflow, weight in parse_numbers("--weight", args.weight).items():
        workflows[workflow] = replace(found.of_workflow(workflow), weight=weight)
    for workflow, limit_s in parse_numbers("--limit", args.limit).items():
        before = workflows.get(workflow, found.of_workflow(workflow))
        workflows[workflow] = replace(before, latency_limit_s=limit_s)
    most = found.max_nodes if args.max_nodes is None else args.max_nodes
    return Requirements(llms=llms, workflows=workflows, spread=found.spread or args.spread, max_nodes=most)

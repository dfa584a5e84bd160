"""`scepsy replay`: traced executions through a plan's engines, event by event, beside what was predicted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scepsy.cli.options import add_json, add_profiles, parse_models
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from rich.console import Console

    from scepsy_optimizer.executions import Execution
    from scepsy_optimizer.plan import Plan

HELP = "replay traced executions on a plan, event by event: latencies with intervals, queues, beside the prediction"

EXAMPLE = """\
  scepsy replay plan.yaml scepsy-traces               # at the plan's rate
  scepsy replay plan.yaml scepsy-traces --rate 6
  scepsy replay plan.yaml scepsy-traces --recorded    # at the traced starts"""


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
    add_profiles(parser)
    add_json(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Replay, compare, show."""
    from pydantic import TypeAdapter
    from rich.console import Console

    from scepsy.cli.comparison import Comparison, latency_table, use_table
    from scepsy.files import load_plan
    from scepsy.inputs import resolve_plan_profiles
    from scepsy.planning import describe_account, read_to_plan
    from scepsy.report.progress import LateProgress
    from scepsy.traces import Tally
    from scepsy_optimizer.percentiles import predict_latencies
    from scepsy_optimizer.placement import require_placed
    from scepsy_optimizer.replications import replay_often, replay_recorded
    from scepsy_optimizer.totals_workload import workload_of

    plan = load_plan(args.plan)
    require_placed(plan)
    recorded = _recorded(args) if args.recorded else []
    rate_rps = _rate_rps(args, plan, recorded)
    if args.seed is not None and args.seed < 0:
        raise ScepsyError(f"--seed {args.seed}: give a number that is not negative")
    errors = Console(stderr=True)
    with LateProgress("reading traces", errors) as progress:
        workload = workload_of(read_to_plan(args.traces, tally := Tally(), progress))
    if losses := describe_account(tally):
        errors.print(f"traces: {losses}", soft_wrap=True, markup=False, highlight=False)
    llms = [demand.llm for demand in workload.demands]
    planned = sorted({part.llm for part in plan.llms})
    if missing := sorted(set(llms).difference(planned)):
        raise ScepsyError(
            f"{args.plan}: no LLM {', '.join(map(repr, missing))}, which the traces call; it has {', '.join(planned)}: "
            "plan for these traces with scepsy optimize"
        )
    profiles = resolve_plan_profiles(plan, llms, profiles=args.profiles, models=parse_models(args.model))
    predicted = predict_latencies(plan, workload, profiles, rate_rps=rate_rps)
    runs = 5 if args.runs is None else args.runs
    with LateProgress("replaying", errors) as progress:
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
    console.print(latency_table(found))
    console.print(use_table(plan, found))
    return 0


def _recorded(args: argparse.Namespace) -> list[Execution]:
    """The executions themselves, with their starts, of those that call an LLM."""
    drawn = {"--runs": args.runs, "--seed": args.seed, "--executions": args.executions}
    if given := [option for option, value in drawn.items() if value is not None]:
        raise ScepsyError(f"--recorded replays every execution once, as it was traced: leave out {', '.join(given)}")
    from scepsy.traces import Tally, iter_executions
    from scepsy.traces.assemble import fill_in

    tally = Tally()
    found = [execution for execution in fill_in(iter_executions(args.traces, tally), tally) if execution.calls]
    return sorted(found, key=lambda execution: (execution.started_ns, execution.id))


def _rate_rps(args: argparse.Namespace, plan: Plan, recorded: Sequence[Execution]) -> float:
    if args.rate is not None:
        if not 0 < args.rate < float("inf"):
            raise ScepsyError("--rate: above 0")
        return float(args.rate)
    if args.recorded:
        from scepsy_optimizer.replications import recorded_rate_rps

        return recorded_rate_rps(recorded)
    if not plan.rate_rps > 0:
        raise ScepsyError(f"{args.plan} is for no rate: give one with --rate")
    return plan.rate_rps

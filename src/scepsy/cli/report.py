"""`scepsy report`: what the traced executions ask of each LLM."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from scepsy.cli.options import add_json, add_traces

if TYPE_CHECKING:
    from rich.console import Console

HELP = "show what the traced executions ask of each LLM, and how sure that is"

EXAMPLE = """\
  scepsy report scepsy-traces
  scepsy report scepsy-traces --html report.html
  scepsy report scepsy-traces --json | jq '.llms[] | {llm, share}'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_traces(parser)
    add_json(parser)
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page as well")


def run(args: argparse.Namespace, console: Console) -> int:
    """Read, aggregate, show."""
    from rich.console import Console

    from scepsy.planning import read_totals
    from scepsy.report.progress import LateProgress
    from scepsy.report.summary import summarise
    from scepsy.report.terminal import print_report
    from scepsy.traces import Tally
    from scepsy_optimizer.totals_workload import workload_of

    tally = Tally()
    with LateProgress("reading traces", Console(stderr=True)) as progress:
        totals = read_totals(args.traces, tally, progress)
    workload = workload_of(totals)
    if args.html:
        from scepsy.report.page import write_page

        write_page(summarise(tally, totals, workload), args.html)
    if args.json:
        print(json.dumps(summarise(tally, totals, workload, timelines=False)))
        return 0
    print_report(summarise(tally, totals, workload, timelines=False), workload, console)
    if args.html:
        console.print(f"written to {args.html}", soft_wrap=True)
    return 0

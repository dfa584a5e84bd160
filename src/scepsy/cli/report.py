"""`scepsy report`: what the traced executions ask of each LLM."""

from __future__ import annotations

import argparse

from rich.console import Console

from scepsy.cli.options import add_traces
from scepsy.report.tables import workload_table
from scepsy.traces import read_executions
from scepsy_optimizer.workload import aggregate

HELP = "show what the traced executions ask of each LLM, and how sure that is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_traces(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Read, aggregate, show."""
    reading = read_executions(args.traces)
    console.print(workload_table(aggregate(reading.executions)))
    for reason, count in sorted(reading.dropped.items()):
        console.print(f"left out: {count} x {reason}", soft_wrap=True)
    return 0

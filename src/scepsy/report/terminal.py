"""The report for a terminal: what the page shows, as tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from scepsy.report.summary import warnings
from scepsy.report.tables import add_rows, brief, plain_table, workload_table
from scepsy_optimizer.workload import Workload


def print_report(summary: Mapping[str, Any], workload: Workload, console: Console) -> None:
    """Print a summary (`summarise(...)`) and its workload: LLMs, workflows, roles, wall time, losses, warnings."""
    title = f"{summary['executions']:,} executions, {summary['calls']:,} LLM calls, {summary['spans']:,} spans"
    for table in (workload_table(workload, title), _workflows(summary), _roles(summary)):
        console.print(table)
        console.print()
    console.print(_wall_time(summary))
    for what in ("dropped", "repaired"):
        for reason, count in summary[what].items():
            words = "left out" if what == "dropped" else "mended"
            console.print(Text(f"{words}: {count:,} {reason}"), soft_wrap=True)
    for sentence in warnings(summary):
        console.print(Text(f"Note: {sentence}", style="yellow"), soft_wrap=True)


def _workflows(summary: Mapping[str, Any]) -> Any:
    table = plain_table("workflows", caption="width: calls at once; depth: calls one after another; deep: recursion")
    rows = []
    for flow in summary["workflows"]:
        latency = flow["latency_s"]
        row = (
            flow["workflow"],
            f"{flow['executions']:,}",
            brief(latency["mean"], 2),
            brief(latency["quantiles"]["0.5"], 2),
            brief(latency["quantiles"]["0.95"], 2),
            f"{flow['latency_cv']:.2f}",
            f"{flow['calls']:.1f}",
            f"{flow['width']['mean']:.1f}",
            f"{flow['depth']['mean']:.1f}",
            f"{flow['rounds']['mean']:.1f}",
            str(flow["recursion"]) if flow["recursion"] > 1 else "-",
        )
        rows.append(row)
    columns = ("workflow", "runs", "mean", "p50", "p95", "cv", "calls", "width", "depth", "rounds", "deep")
    add_rows(table, 1, columns, rows)
    return table


def _roles(summary: Mapping[str, Any]) -> Any:
    table = plain_table("roles")
    rows = [
        (
            role["llm"],
            role["role"] or "-",
            f"{role['visits']:.1f}",
            f"{role['input_tokens']:.0f}",
            f"{role['output_tokens']:.0f}",
            f"{role['share']:.1%}",
        )
        for role in summary["roles"]
    ]
    add_rows(table, 2, ("LLM", "role", "calls", "in", "out", "share"), rows)
    return table


def _wall_time(summary: Mapping[str, Any]) -> Text:
    """Where the mean execution's time went, along its critical path."""
    parts = {**summary["critical_path_s"]["llms"], "outside LLMs": summary["critical_path_s"]["outside_llms"]}
    total = sum(parts.values()) or 1.0
    told = [f"{name} {seconds:.2f} s ({seconds / total:.0%})" for name, seconds in parts.items() if seconds > 0]
    return Text(f"wall time: {', '.join(told)}")

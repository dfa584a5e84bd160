"""The report for a terminal: what the page shows, as tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from scepsy.report.summary import warnings
from scepsy.report.tables import plain_table


def print_report(summary: Mapping[str, Any], console: Console) -> None:
    """Print a summary (`summarise(...)`): LLMs, workflows, roles, wall time, what was left out, and warnings."""
    for table in (_llms(summary), _workflows(summary), _roles(summary)):
        console.print(table)
        console.print()
    console.print(_wall_time(summary))
    for what in ("dropped", "repaired"):
        for reason, count in summary[what].items():
            words = "left out" if what == "dropped" else "mended"
            console.print(Text(f"{words}: {count:,} {reason}"), soft_wrap=True)
    for sentence in warnings(summary):
        console.print(Text(f"Note: {sentence}", style="yellow"), soft_wrap=True)


def _llms(summary: Mapping[str, Any]) -> Any:
    table = plain_table(
        f"{summary['executions']:,} executions, {summary['calls']:,} LLM calls, {summary['spans']:,} spans",
        caption=(
            f"mean latency {summary['latency_s']:.2f} s (cv {summary['latency_cv']:.2f}), "
            f"of which {summary['tool_s']:.2f} s outside LLMs; path: calls on the critical path, par.: at once, "
            "±10 %: executions that are missing to know the share so well"
        ),
    )
    table.add_column("LLM", no_wrap=True)
    for column in ("calls", "path", "par.", "in", "out", "s", "share", "95 %", "cv", "±10 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for llm in summary["llms"]:
        more = llm["more_executions"]
        table.add_row(
            escape(llm["llm"]),
            f"{llm['visits']:.1f}",
            f"{llm['critical_visits']:.1f}",
            f"{llm['parallelism']:.1f}",
            f"{llm['input_tokens']:.0f}",
            f"{llm['output_tokens']:.0f}",
            f"{llm['service_s']:.2f}",
            f"{llm['share']:.1%}",
            f"{llm['share_low']:.1%}-{llm['share_high']:.1%}",
            f"{llm['share_cv']:.2f}",
            "?" if more is None else f"+{more:,}" if more else "enough",
        )
    return table


def _workflows(summary: Mapping[str, Any]) -> Any:
    table = plain_table("workflows", caption="width: calls at once; depth: calls one after another; deep: recursion")
    table.add_column("workflow", no_wrap=True)
    for column in ("runs", "mean", "p50", "p95", "cv", "calls", "width", "depth", "rounds", "deep"):
        table.add_column(column, justify="right", no_wrap=True)
    for flow in summary["workflows"]:
        latency = flow["latency_s"]
        table.add_row(
            escape(flow["workflow"]),
            f"{flow['executions']:,}",
            f"{latency['mean']:.2f}",
            f"{latency['quantiles']['0.5']:.2f}",
            f"{latency['quantiles']['0.95']:.2f}",
            f"{flow['latency_cv']:.2f}",
            f"{flow['calls']:.1f}",
            f"{flow['width']['mean']:.1f}",
            f"{flow['depth']['mean']:.1f}",
            f"{flow['rounds']['mean']:.1f}",
            str(flow["recursion"]) if flow["recursion"] > 1 else "-",
        )
    return table


def _roles(summary: Mapping[str, Any]) -> Any:
    table = plain_table("roles")
    table.add_column("LLM", no_wrap=True)
    table.add_column("role", no_wrap=True)
    for column in ("calls", "in", "out", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for role in summary["roles"]:
        table.add_row(
            escape(role["llm"]),
            escape(role["role"]) or "-",
            f"{role['visits']:.1f}",
            f"{role['input_tokens']:.0f}",
            f"{role['output_tokens']:.0f}",
            f"{role['share']:.1%}",
        )
    return table


def _wall_time(summary: Mapping[str, Any]) -> Text:
    """Where the mean execution's time went, along its critical path."""
    parts = {**summary["critical_path_s"]["llms"], "outside LLMs": summary["critical_path_s"]["outside_llms"]}
    total = sum(parts.values()) or 1.0
    told = [f"{name} {seconds:.2f} s ({seconds / total:.0%})" for name, seconds in parts.items() if seconds > 0]
    return Text(f"wall time: {', '.join(told)}")

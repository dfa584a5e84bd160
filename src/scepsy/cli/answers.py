"""Answers of the optimizer as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from scepsy.report.tables import groups_words, plain_table
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.frontier import FrontierPoint
from scepsy_optimizer.moves import plan_moves
from scepsy_optimizer.next_device import NextDevice
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import plan_choices
from scepsy_optimizer.robust import Robustness, UnderLoad
from scepsy_optimizer.sharing import WorkflowShare
from scepsy_optimizer.what_if import WhatIf


def frontier_table(points: Sequence[FrontierPoint], cluster: Cluster) -> Table:
    """Latency by number of devices (rows) and rate (columns); what some other point beats is left empty."""
    table = plain_table(
        f"least mean latency in s by devices and executions/s, of {cluster.devices} {cluster.device_type}",
        caption="empty: out of reach, or no better than with fewer devices or at a higher rate",
    )
    rates = sorted({point.rate_rps for point in points})
    cells = {(point.devices, point.rate_rps): f"{point.latency_s:.2f}" for point in points}
    table.add_column("devices", justify="right", no_wrap=True)
    for rate in rates:
        table.add_column(f"{rate:.3g}", justify="right", no_wrap=True)
    for devices in sorted({point.devices for point in points}):
        table.add_row(str(devices), *(cells.get((devices, rate), "") for rate in rates))
    return table


def shares_table(shares: Sequence[WorkflowShare]) -> Table:
    """Who pays for whom: what each workflow uses, and its latency shared, alone on all, and alone on its part."""
    table = plain_table(
        "who pays for whom",
        caption="devices: its part by service time; alone: the whole cluster to itself; own part: as many devices as "
        "it uses, to itself",
    )
    table.add_column("workflow", no_wrap=True)
    for column in ("per s", "devices", "latency s", "alone", "own part", "sharing"):
        table.add_column(column, justify="right", no_wrap=True)
    for share in shares:
        if share.part_s == float("inf"):
            words = "makes it possible"
        else:
            change = share.latency_s / share.part_s - 1
            words = f"{abs(change):.0%} {'faster' if change <= 0 else 'slower'}"
        table.add_row(
            escape(share.workflow),
            f"{share.rate_rps:.3g}",
            f"{share.devices:.2f}",
            f"{share.latency_s:.2f}",
            _seconds(share.alone_s),
            _seconds(share.part_s),
            words,
        )
    return table


def changes_table(plan: Plan, changes: Sequence[WhatIf]) -> Table:
    """What one device more and one less would give at the plan's rate, and what they would move."""
    table = plain_table(f"with one device more or less, at {plan.rate_rps:g} executions/s")
    table.add_column("cluster", no_wrap=True)
    for column in ("latency s", "up to /s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what would change")
    for one in changes:
        latency = _seconds(_mean_s(one.plan) if one.plan else float("inf"))
        if one.change == 0:
            table.add_row("as it is", latency, f"{one.highest_rate_rps:.3g}", "")
            continue
        words = _describe_change(plan, one.plan) if one.plan else one.reason
        table.add_row(f"{one.change:+d} {one.device_type}", latency, f"{one.highest_rate_rps:.3g}", escape(words))
    return table


def next_devices_table(plan: Plan, found: Sequence[NextDevice]) -> Table:
    """What one device more would buy each LLM while the others stay as they are."""
    table = plain_table("the next device, if one LLM got it")
    table.add_column("LLM", no_wrap=True)
    for column in ("latency s", "up to /s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("it would have")
    several = len(plan.cluster.device_types) > 1
    now = _groups(plan)
    for one in found:
        words = groups_words(one.groups)
        table.add_row(
            escape(f"{one.llm} +1 {one.device_type}" if several else one.llm),
            _seconds(one.latency_s),
            f"{one.max_rate_rps:.3g}",
            "no better use of it" if words == now.get(one.llm) else words,
        )
    return table


def describe_moves_from(name: str, old: Plan, new: Plan) -> str:
    """What the way from an old plan to a new one takes, in one line."""
    moves = plan_moves(old, new)
    words = f"from {name}: of the replicas {len(moves.stay)} stay, {moves.restarts} start"
    if moves.interrupted:
        words += f", which interrupts {', '.join(moves.interrupted)}"
    return words


def describe_robustness(plan: Plan, found: Robustness) -> str:
    """What a robust plan is planned for, what it costs at the traced means, and what it buys, in one line."""
    factors = ", ".join(f"{llm} x{factor:.2f}" for llm, factor in found.factors.items())
    now, before = _mean_s(plan), _mean_s(found.plain)
    price = f"{now:.2f} s instead of {before:.2f} s at the traced mean ({now / before - 1:+.1%})"
    if plan.rate_rps != found.plain.rate_rps:
        price += f" and {plan.rate_rps:.3g} instead of {found.plain.rate_rps:.3g} executions/s"
    devices, plain = (sum(part.device_count for part in one.llms) for one in (plan, found.plain))
    if devices != plain:
        price += f", {devices:g} instead of {plain:g} devices"
    return (
        f"robust: loads at the {found.quantile:g} quantile ({factors}). Its price: {price}. "
        f"At that quantile: {_under_load(found.at_quantile)}, instead of {_under_load(found.plain_at_quantile)}"
    )


def _under_load(found: UnderLoad) -> str:
    return f"{_seconds(found.latency_s)} s, LLMs loaded up to {found.utilisation:.0%}"


def _describe_change(old: Plan, new: Plan) -> str:
    """What a new plan gives to LLMs instead of what an old one does."""
    before, after = _groups(old), _groups(new)
    words = [
        f"{llm}: {before.get(llm, 'nothing')} -> {after.get(llm, 'nothing')}"
        for llm in dict.fromkeys([*before, *after])
        if before.get(llm) != after.get(llm)
    ]
    moves = plan_moves(old, new)
    return f"{'; '.join(words) or 'nothing'} (replicas: {len(moves.stay)} stay, {moves.restarts} start)"


def _groups(plan: Plan) -> dict[str, str]:
    return {llm: groups_words(groups) for llm, groups in plan_choices(plan).items()}


def _mean_s(plan: Plan) -> float:
    return plan.prediction.latency_s if plan.prediction else float("inf")


def _seconds(value_s: float) -> str:
    return "out of reach" if value_s == float("inf") else f"{value_s:.2f}"

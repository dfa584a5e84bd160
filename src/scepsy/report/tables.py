"""Workloads and plans as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from scepsy.report.summary import executions_needed
from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.plan import LLMPlan, Plan
from scepsy_optimizer.workload import Workload


def plain_table(title: str, caption: str | None = None) -> Table:
    """An empty table in the common style: no frame, so that it fits a terminal of 80 columns."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )


def add_rows(table: Table, names: int, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Add columns and rows. The first `names` columns hold names: where it is narrow they fold, numbers never do."""
    for index, (column, *cells) in enumerate(zip(columns, *rows, strict=True)):
        if index < names:
            table.add_column(column, overflow="fold", min_width=6)
        else:
            widest = max(map(len, (column, *cells)))
            table.add_column(column, justify="right", no_wrap=True, min_width=widest)
    for row in rows:
        table.add_row(*(escape(cell) if index < names else cell for index, cell in enumerate(row)))


def brief(value: float, digits: int) -> str:
    """A number with so many digits after the point, without any if it is large: a table must fit 80 columns."""
    return f"{value:.{digits if abs(value) < 100 else 0}f}"


def _tokens(value: float) -> str:
    return f"{value:.0f}" if value < 1e5 else f"{value / 1e3:.0f}k"


def workload_table(workload: Workload, title: str | None = None) -> Table:
    """One row per LLM: what a mean execution asks of it, its share, and how well that is known.

    Columns: calls per execution, those on the critical path, calls at once, tokens per call in and out, seconds of
    service per execution, share of all LLMs' seconds with its interval, variation of the share among executions, and
    how many more of them would bring the interval to ±10 %.
    """
    counts = ", ".join(f"{count} {escape(workflow)}" for workflow, count in workload.workflows.items())
    table = plain_table(
        title or f"{workload.executions} executions ({counts})",
        caption=(
            f"mean latency {workload.latency_s:.2f} s (cv {workload.latency_cv:.2f}), "
            f"of which {workload.tool_s:.2f} s outside LLMs; path: calls on the critical path, par.: at once, "
            "±10 %: executions that are missing to know the share so well"
        ),
    )
    rows = []
    for demand in workload.demands:
        more = executions_needed(demand, workload.executions)
        row = (
            demand.llm,
            brief(demand.visits, 1),
            brief(demand.critical_visits, 1),
            f"{demand.parallelism:.1f}",
            _tokens(demand.input_tokens),
            _tokens(demand.output_tokens),
            brief(demand.service_s, 2),
            f"{demand.share:.1%}",
            f"{demand.share_low * 100:.1f}-{demand.share_high:.1%}",
            f"{demand.share_cv:.2f}",
            "?" if more is None else f"+{more}" if more else "enough",
        )
        rows.append(row)
    columns = ("LLM", "calls", "path", "par.", "in", "out", "s", "share", "95 %", "cv", "±10 %")
    add_rows(table, 1, columns, rows)
    return table


def plan_table(plan: Plan) -> Table:
    """One row per group of equal replicas: what it gets, where, and what is predicted of it.

    The caption has the prediction of the whole.
    """
    table = plain_table(
        f"plan for {plan.rate_rps:g} executions/s on {plan.cluster.devices} {plan.cluster.device_type}",
        caption=describe_prediction(plan),
    )
    table.add_column("LLM", no_wrap=True)
    table.add_column("each replica", no_wrap=True)
    for column in ("replicas", "devices", "calls/s", "load", "s/call"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("where")
    for part in plan.llms:
        table.add_row(
            escape(part.llm),
            replica_words(part),
            str(part.replicas),
            f"{part.device_count:g}",
            f"{part.rate_rps:.1f}",
            f"{part.utilisation:.0%}",
            f"{part.predicted_call_s:.3f}",
            _where(plan, part),
        )
    return table


def replica_words(part: LLMPlan | Choice) -> str:
    """What one replica of a group gets, such as "2 devices", "0.2 device" or "0.2 L40S"."""
    if part.fraction < 1:
        return f"{float(part.fraction):g} {part.device_type or 'device'}"
    if part.tensor_parallel_size == 1:
        return f"1 {part.device_type or 'device'}"
    return f"{part.tensor_parallel_size} {part.device_type or 'devices'}"


def groups_words(groups: Iterable[LLMPlan | Choice]) -> str:
    """What one LLM gets, such as "2 x 1 device + 1 x 0.5 device"."""
    return " + ".join(sorted(f"{group.replicas} x {replica_words(group)}" for group in groups))


def describe_prediction(plan: Plan) -> str:
    """The prediction of a plan in one line."""
    prediction = plan.prediction
    if prediction is None:
        return "no prediction"
    words = f"predicted latency {prediction.latency_s:.2f} s, up to {prediction.max_rate_rps:.2f}/s"
    words += f" (bottleneck {prediction.bottleneck})"
    if prediction.replayed is not None:
        replayed = prediction.replayed
        words += f"; replayed {replayed.mean_s:.2f} s, p50 {replayed.p50_s:.2f}, p95 {replayed.p95_s:.2f}"
    if prediction.objective_s is not None:
        words += f"; with the workflows' weights {prediction.objective_s:.2f} s"
    if prediction.lower_bound_s > 0:
        words += f"; no allocation is under {prediction.lower_bound_s:.2f} s (gap {prediction.gap:.1%})"
    return words


def _where(plan: Plan, part: LLMPlan) -> str:
    """Devices of the slots, with the node's name where there are several nodes."""
    prefix = len(plan.cluster.nodes) > 1
    words = ["+".join(str(device) for device in slot.devices) for slot in part.slots]
    if prefix:
        words = [f"{slot.node}:{word}" for slot, word in zip(part.slots, words, strict=True)]
    return " ".join(words) if len(words) <= 12 else f"{' '.join(words[:12])} ... ({len(words)} slots)"

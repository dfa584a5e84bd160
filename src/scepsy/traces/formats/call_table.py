"""A plain table of calls, one row each, for everything that has no exporter.

Columns go by any of their usual names. Rows without a model are steps, which other rows may name as their parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from scepsy import semconv
from scepsy.traces.dialects.table import number
from scepsy.traces.records import CALL, STEP, NoTracesError, RawSpan, Tally
from scepsy.traces.times import parse_time_ns

BROKEN: Final = "rows without an execution or a start"
NO_DURATION: Final = "calls without a duration, taken as instants"

COLUMNS: Final[Mapping[str, Sequence[str]]] = {
    "execution": ("execution", "execution_id", "trace", "trace_id"),
    "call": ("call", "call_id", "span_id", "id"),
    "parent": ("parent", "parent_id"),
    "model": ("model", "llm"),
    "start": ("start_s", "start", "start_time"),
    "duration": ("duration_s", "duration", "latency_s", "api_time_s"),
    "end": ("end_s", "end", "end_time"),
    "input_tokens": ("input_tokens", "prompt_tokens", "in_tok"),
    "output_tokens": ("output_tokens", "completion_tokens", "out_tok"),
    "cached_tokens": ("cached_tokens",),
    "time_to_first_token": ("time_to_first_token_s", "ttft_s"),
    "role": ("role", "agent", "name"),
    "workflow": ("workflow",),
}
"""What each column may be called. Times are seconds from any common origin, or moments in ISO 8601."""

_REQUIRED = ("execution", "model", "start")
# Seconds that start at 0 must not look like times that are missing.
_ORIGIN_NS = 10**18


def spans(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, workflow: str, place: str, tally: Tally
) -> Iterator[RawSpan]:
    """The rows as spans; `workflow` names the executions of a table without such a column.

    Raises NoTracesError, which names the `place`, for a table without the columns that are needed.
    """
    names = {fact: _column(fact, columns) for fact in COLUMNS}
    missing = [fact for fact in _REQUIRED if not names[fact]]
    if not names["duration"] and not names["end"]:
        missing.append("duration")
    if missing:
        known = "; ".join(f"{fact}: {' or '.join(COLUMNS[fact])}" for fact in missing)
        raise NoTracesError(
            f"{place}: a table of calls lacks columns ({known}); it has {', '.join(map(str, columns)) or 'none'}"
        )
    for index, row in enumerate(rows):
        tally.spans += 1
        raw = _span({fact: row.get(name) if name else None for fact, name in names.items()}, index, workflow, tally)
        if raw is None:
            tally.dropped[BROKEN] += 1
        else:
            yield raw


def _column(fact: str, columns: Sequence[str]) -> str:
    return next((name for name in COLUMNS[fact] if name in columns), "")


def _span(row: Mapping[str, Any], index: int, workflow: str, tally: Tally) -> RawSpan | None:
    execution, start_ns = row["execution"], _time_ns(row["start"])
    if execution in (None, "") or start_ns is None:
        return None
    end_ns = _time_ns(row["end"])
    duration_s = number(row["duration"])
    if duration_s is not None and duration_s < 1e9:
        end_ns = start_ns + round(duration_s * 1e9)
    model = _text(row["model"])
    if end_ns is None:
        end_ns = start_ns
        tally.repaired[NO_DURATION] += 1
    role = _text(row["role"])
    return RawSpan(
        str(execution),
        _text(row["call"]) or f"row {index}",
        _text(row["parent"]),
        f"chat {model}" if model else role or "step",
        start_ns,
        end_ns,
        "call-table",
        {
            semconv.KIND: CALL if model else STEP,
            semconv.REQUEST_MODEL: model,
            semconv.ROLE if model else semconv.AGENT_NAME: role,
            semconv.WORKFLOW_NAME: _text(row["workflow"]) or workflow,
            semconv.INPUT_TOKENS: row["input_tokens"],
            semconv.OUTPUT_TOKENS: row["output_tokens"],
            semconv.CACHED_TOKENS: row["cached_tokens"],
            semconv.TIME_TO_FIRST_CHUNK_S: row["time_to_first_token"],
        },
        {},
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _time_ns(value: object) -> int | None:
    if isinstance(value, str) and value:
        try:
            value = float(value)
        except ValueError:
            return parse_time_ns(value) or None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _ORIGIN_NS + round(value * 1e9) if abs(value) < 1e9 * 8 else None
    return parse_time_ns(value) or None

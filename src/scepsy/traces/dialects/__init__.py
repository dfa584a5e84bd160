"""Dialects: how different instrumentations name the same things. One small module each."""

from __future__ import annotations

from typing import Final

from scepsy.traces.dialects import engine, langfuse, openinference, opentelemetry, traceloop
from scepsy.traces.dialects.table import Dialect, Plan, translate
from scepsy.traces.records import RawSpan, SpanRecord

DIALECTS: Final[tuple[Dialect, ...]] = (
    openinference.DIALECT,
    langfuse.DIALECT,
    traceloop.DIALECT,
    engine.DIALECT,
    engine.START,
    opentelemetry.DIALECT,
)
"""In the order in which they are asked. The last one takes every span."""

WANTED: Final = frozenset[str]().union(*(dialect.wanted for dialect in DIALECTS))
"""Every attribute key that any of them looks at. The rest, prompts among them, need not be kept."""

_MOST_PLANS = 10_000
_plans: dict[tuple[str, ...], Plan] = {}


def normalise(raw: RawSpan) -> SpanRecord:
    """The span in Scepsy's words, by the first dialect that recognises it."""
    keys = tuple(raw.attributes)
    plan = _plans.get(keys)
    if plan is None:
        plan = Plan(next(dialect for dialect in DIALECTS if _recognises(dialect, keys)), keys)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[keys] = plan
    return translate(raw, plan)


def _recognises(dialect: Dialect, keys: tuple[str, ...]) -> bool:
    if dialect.alone:
        return bool(keys) and all(key in dialect.marks for key in keys)
    return not dialect.marks or any(mark in keys for mark in dialect.marks)

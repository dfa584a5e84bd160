"""Dialects: how different instrumentations name the same things. One small module each."""

from __future__ import annotations

from typing import Final

from scepsy.traces.dialects import engine, langfuse, openinference, opentelemetry, traceloop
from scepsy.traces.dialects.table import Dialect, translate
from scepsy.traces.records import RawSpan, SpanRecord

DIALECTS: Final[tuple[Dialect, ...]] = (
    openinference.DIALECT,
    langfuse.DIALECT,
    traceloop.DIALECT,
    engine.DIALECT,
    opentelemetry.DIALECT,
)
"""In the order in which they are asked. The last one takes every span."""


def normalise(raw: RawSpan) -> SpanRecord:
    """The span in Scepsy's words, by the first dialect that recognises it."""
    for dialect in DIALECTS:
        if dialect.recognises(raw):
            return translate(raw, dialect)
    raise AssertionError("the last dialect takes every span")

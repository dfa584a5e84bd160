"""What a dialect is, and the one reader of them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scepsy.traces.records import CALL_LIKE, FAILED, OK, RawSpan, SpanRecord

_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Attribute keys of each fact, the first that is present wins. Times are in seconds."""

    label: Sequence[str] = ()
    workflow: Sequence[str] = ()
    role: Sequence[str] = ()
    model: Sequence[str] = ()
    address: Sequence[str] = ()
    port: Sequence[str] = ()
    response_id: Sequence[str] = ()
    input_tokens: Sequence[str] = ()
    output_tokens: Sequence[str] = ()
    cached_tokens: Sequence[str] = ()
    time_to_first_token_s: Sequence[str] = ()
    queue_s: Sequence[str] = ()
    error: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one family of instrumentations writes its spans.

    `kind` names the kind of a recognised span. `refine` corrects what a table cannot say: it gets the span and its
    translation and returns a better one.
    """

    name: str
    recognises: Callable[[RawSpan], bool]
    kind: Callable[[RawSpan], str]
    keys: Keys
    refine: Callable[[RawSpan, SpanRecord], SpanRecord] | None = None


def translate(raw: RawSpan, dialect: Dialect) -> SpanRecord:
    """The span in Scepsy's words."""
    keys = dialect.keys
    attributes = raw.attributes
    kind = dialect.kind(raw)
    failed = raw.failed or bool(keys.error and text(attributes, keys.error))
    if kind in CALL_LIKE:
        address = text(attributes, keys.address)
        port = count(attributes, keys.port) if address else None
        record = SpanRecord(
            raw.trace,
            raw.id,
            raw.parent,
            raw.name,
            kind,
            raw.start_ns,
            raw.end_ns,
            FAILED if failed else OK,
            raw.remote_parent,
            "",
            text(attributes, keys.workflow),
            text(attributes, keys.role),
            text(attributes, keys.model),
            address if port is None else f"{address}:{port}",
            text(attributes, keys.response_id),
            count(attributes, keys.input_tokens),
            count(attributes, keys.output_tokens),
            count(attributes, keys.cached_tokens),
            seconds(attributes, keys.time_to_first_token_s),
            seconds(attributes, keys.queue_s),
        )
    else:
        record = SpanRecord(
            raw.trace,
            raw.id,
            raw.parent,
            raw.name,
            kind,
            raw.start_ns,
            raw.end_ns,
            FAILED if failed else OK,
            raw.remote_parent,
            text(attributes, keys.label) or raw.name[:_LONGEST_NAME],
            text(attributes, keys.workflow),
        )
    return record if dialect.refine is None else dialect.refine(raw, record)


def text(attributes: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of `keys` that holds text, cut to a sensible length for a name; empty if none does."""
    for key in keys:
        value = attributes.get(key)
        if value and isinstance(value, str):
            return value[:_LONGEST_NAME]
    return ""


def count(attributes: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """The first of `keys` that holds a whole number of at least 0 (-1 is a known placeholder), else None."""
    for key in keys:
        value = attributes.get(key)
        if value is not None:
            found = number(value)
            if found is not None:
                return int(found)
    return None


def seconds(attributes: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """The first of `keys` that holds a time of at least 0, else None."""
    for key in keys:
        value = attributes.get(key)
        if value is not None:
            found = number(value)
            if found is not None:
                return float(found)
    return None


def number(value: object) -> int | float | None:
    """A finite number of at least 0, also when it was written as text; else None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if 0 <= value < math.inf else None

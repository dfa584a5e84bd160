"""What a dialect is, and the one reader of them all.

Spans of one kind from one instrumentation have the same attribute keys. So what a table says of them, which dialect it
is and which of its keys are there, is worked out once for each set of keys and looked up after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from scepsy.traces.records import CALL_LIKE, FAILED, OK, RawSpan, SpanRecord

_LONGEST_NAME = 200
_LARGEST = 10**15


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

    A span is of this dialect if it has one of `marks`, or, with `alone`, if nothing that any dialect looks at but its
    marks is there; no marks take every span. `kind` names the kind of such a span.
    `refine` corrects in place what a table cannot say: it gets the span and its translation; with
    `refine_if` it is asked only about spans that have one of these keys. `also` names the other keys that the two look
    at: attributes that no dialect names are not even read.
    """

    name: str
    marks: Sequence[str]
    kind: Callable[[RawSpan], str]
    keys: Keys
    also: Sequence[str] = ()
    refine: Callable[[RawSpan, SpanRecord], None] | None = None
    refine_if: Sequence[str] = ()
    alone: bool = False

    @property
    def wanted(self) -> frozenset[str]:
        """Every attribute key that it looks at."""
        told = (key for fact in fields(Keys) for key in getattr(self.keys, fact.name))
        return frozenset((*self.marks, *self.also, *self.refine_if, *told))


_TEXTS: Final = ("workflow", "role", "model", "response_id")
_COUNTS: Final = ("input_tokens", "output_tokens", "cached_tokens")
_SECONDS: Final = ("time_to_first_token_s", "queue_s")
_FIELDS: Final = SpanRecord.__struct_fields__
_NOTHING_TOLD: Final = SpanRecord.__struct_defaults__


class Plan:
    """How spans with one set of keys are read: which facts their keys can tell."""

    __slots__ = ("address", "counts", "error", "kind", "label", "port", "refine", "seconds", "texts", "workflow")

    def __init__(self, dialect: Dialect, keys: Sequence[str]) -> None:
        def present(fact: str) -> tuple[str, ...]:
            return tuple(key for key in getattr(dialect.keys, fact) if key in keys)

        def found(facts: Sequence[str]) -> list[tuple[int, tuple[str, ...]]]:
            return [(_FIELDS.index(fact), told) for fact in facts if (told := present(fact))]

        self.kind = dialect.kind
        self.label = present("label")
        self.workflow = present("workflow")
        self.error = present("error")
        self.address = present("address")
        self.port = present("port")
        self.texts = found(_TEXTS)
        self.counts = found(_COUNTS)
        self.seconds = found(_SECONDS)
        asked = not dialect.refine_if or any(key in keys for key in dialect.refine_if)
        self.refine = dialect.refine if asked else None


_ENDPOINT: Final = _FIELDS.index("endpoint")


def translate(raw: RawSpan, plan: Plan) -> SpanRecord:
    """The span in Scepsy's words."""
    attributes = raw.attributes
    kind = plan.kind(raw)
    status = FAILED if raw.failed or (plan.error and text(attributes, plan.error)) else OK
    if kind in CALL_LIKE:
        told: list[Any] = [
            raw.trace, raw.id, raw.parent, raw.name, kind, raw.start_ns, raw.end_ns, status, raw.remote_parent, "", "",
            *_NOTHING_TOLD,
        ]  # fmt: skip
        # The first key holds what it should in all but odd spans, and there are millions of spans.
        for index, keys in plan.texts:
            value = attributes[keys[0]]
            usual = value.__class__ is str and 0 < len(value) <= _LONGEST_NAME
            told[index] = value if usual else text(attributes, keys)
        for index, keys in plan.counts:
            value = attributes[keys[0]]
            usual = value.__class__ is int and 0 <= value < _LARGEST
            told[index] = value if usual else _first_number(attributes, keys, int)
        for index, keys in plan.seconds:
            told[index] = _first_number(attributes, keys, float)
        if plan.address:
            address = text(attributes, plan.address)
            port = number(attributes[plan.port[0]]) if plan.port and address else None
            told[_ENDPOINT] = address if port is None else f"{address}:{int(port)}"
        record = SpanRecord(*told)
    else:
        name = raw.name
        label = (plan.label and text(attributes, plan.label)) or name[:_LONGEST_NAME]
        workflow = text(attributes, plan.workflow) if plan.workflow else ""
        record = SpanRecord(
            raw.trace, raw.id, raw.parent, name, kind, raw.start_ns, raw.end_ns, status, raw.remote_parent, label,
            workflow,
        )  # fmt: skip
    if plan.refine is not None:
        plan.refine(raw, record)
    return record


def _first_number(
    attributes: Mapping[str, Any], keys: Sequence[str], make: type[int] | type[float]
) -> int | float | None:
    for key in keys:
        value = number(attributes[key])
        if value is not None:
            return make(value)
    return None


def text(attributes: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of `keys` that holds text, cut to a sensible length for a name; empty if none does."""
    for key in keys:
        value = attributes.get(key)
        if value and isinstance(value, str):
            return value[:_LONGEST_NAME]
    return ""


def number(value: object) -> int | float | None:
    """A number of at least 0 (-1 is a known placeholder) and sensible size, also when written as text; else None."""
    if type(value) is int:
        return value if 0 <= value < _LARGEST else None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if 0 <= value < _LARGEST else None

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

    A span is of this dialect if it has one of `marks`; no marks take every span. `kind` names the kind of such a span.
    `refine` corrects what a table cannot say: it gets the span and its translation and returns a better one; with
    `refine_if` it is asked only about spans that have one of these keys. `also` names the other keys that the two look
    at: attributes that no dialect names are not even read.
    """

    name: str
    marks: Sequence[str]
    kind: Callable[[RawSpan], str]
    keys: Keys
    also: Sequence[str] = ()
    refine: Callable[[RawSpan, SpanRecord], SpanRecord] | None = None
    refine_if: Sequence[str] = ()

    @property
    def wanted(self) -> frozenset[str]:
        """Every attribute key that it looks at."""
        told = (key for fact in fields(Keys) for key in getattr(self.keys, fact.name))
        return frozenset((*self.marks, *self.also, *self.refine_if, *told))


_TEXTS: Final = ("workflow", "role", "model", "response_id")
_COUNTS: Final = ("input_tokens", "output_tokens", "cached_tokens")
_SECONDS: Final = ("time_to_first_token_s", "queue_s")
_NOTHING_TOLD: Final = tuple(SpanRecord._field_defaults.values())


class Plan:
    """How spans with one set of keys are read: which facts their keys can tell."""

    __slots__ = ("address", "dialect", "error", "label", "numbers", "port", "refine", "texts", "workflow")

    def __init__(self, dialect: Dialect, keys: Sequence[str]) -> None:
        def present(fact: str) -> tuple[str, ...]:
            return tuple(key for key in getattr(dialect.keys, fact) if key in keys)

        def found(facts: Sequence[str]) -> list[tuple[int, tuple[str, ...]]]:
            return [(SpanRecord._fields.index(fact), told) for fact in facts if (told := present(fact))]

        self.dialect = dialect
        self.label = present("label")
        self.workflow = present("workflow")
        self.error = present("error")
        self.address = present("address")
        self.port = present("port")
        self.texts = found(_TEXTS)
        self.numbers = [
            *((index, told, int) for index, told in found(_COUNTS)),
            *((index, told, float) for index, told in found(_SECONDS)),
        ]
        asked = not dialect.refine_if or any(key in keys for key in dialect.refine_if)
        self.refine = dialect.refine if asked else None


_ENDPOINT: Final = SpanRecord._fields.index("endpoint")


def translate(raw: RawSpan, plan: Plan) -> SpanRecord:
    """The span in Scepsy's words."""
    trace, own, parent, name, start_ns, end_ns, _, attributes, _, failed, remote_parent, _ = raw
    kind = plan.dialect.kind(raw)
    if not failed and plan.error:
        failed = bool(text(attributes, plan.error))
    status = FAILED if failed else OK
    if kind in CALL_LIKE:
        told: list[Any] = [
            trace, own, parent, name, kind, start_ns, end_ns, status, remote_parent, "", "", *_NOTHING_TOLD,
        ]  # fmt: skip
        for index, keys in plan.texts:
            told[index] = text(attributes, keys)
        for index, keys, make in plan.numbers:
            for key in keys:
                value = number(attributes[key])
                if value is not None:
                    told[index] = make(value)
                    break
        if plan.address:
            address = text(attributes, plan.address)
            port = number(attributes[plan.port[0]]) if plan.port and address else None
            told[_ENDPOINT] = address if port is None else f"{address}:{int(port)}"
        record = SpanRecord._make(told)
    else:
        label = (plan.label and text(attributes, plan.label)) or name[:_LONGEST_NAME]
        workflow = text(attributes, plan.workflow) if plan.workflow else ""
        record = SpanRecord(
            trace, own, parent, name, kind, start_ns, end_ns, status, remote_parent, label, workflow
        )  # fmt: skip
    return record if plan.refine is None else plan.refine(raw, record)


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

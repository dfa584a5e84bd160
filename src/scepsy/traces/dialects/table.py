"""What a dialect is, and the one reader of them all.

Spans of one kind from one instrumentation have the same attribute keys, and the same values in most of them: only ids
and counts differ. So what a table says of keys is worked out once for each set of keys, what it says of the values that
spans share once for each set of these, and looked up after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any, Final

from scepsy.traces.records import CALL_LIKE, FAILED, LLM, OK, STEP, WORKFLOW, RawSpan, SpanRecord

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
    marks is there; no marks take every span. `kind` names the kind of a span by its attributes, of which it looks at
    `kind_keys` only; it must say the same of values that are equal. With `workflows_are_roots`, a workflow below
    another span is a step.
    `refine` corrects in place what a table cannot say: it gets the span and its translation; with
    `refine_if` it is asked only about spans that have one of these keys. `also` names the other keys that it looks
    at: attributes that no dialect names are not even read.
    """

    name: str
    marks: Sequence[str]
    kind: Callable[[Mapping[str, Any]], str]
    kind_keys: Sequence[str]
    keys: Keys
    also: Sequence[str] = ()
    refine: Callable[[RawSpan, SpanRecord], None] | None = None
    refine_if: Sequence[str] = ()
    alone: bool = False
    workflows_are_roots: bool = False

    @property
    def wanted(self) -> frozenset[str]:
        """Every attribute key that it looks at."""
        told = (key for fact in fields(Keys) for key in getattr(self.keys, fact.name))
        return frozenset((*self.marks, *self.kind_keys, *self.also, *self.refine_if, *told))


_SHARED: Final = ("label", "workflow", "role", "model", "address", "port", "error")
_COUNTS: Final = ("input_tokens", "output_tokens", "cached_tokens")
_SECONDS: Final = ("time_to_first_token_s", "queue_s")
_MOST_SORTS = 1000
_LONGEST_SHARED = 1000

_Sort = tuple[str, str, str, str, str, str, str]


class Plan:
    """How spans with one set of keys are read: which facts their keys can tell, and what was told already."""

    __slots__ = ("_asked", "_dialect", "_keys", "_sorts", "counts", "refine", "response_id", "seconds", "shared")

    def __init__(self, dialect: Dialect, keys: Sequence[str]) -> None:
        present = {
            fact.name: tuple(key for key in getattr(dialect.keys, fact.name) if key in keys) for fact in fields(Keys)
        }
        self._dialect = dialect
        self._keys = present
        self._asked = sorted(
            {*dialect.kind_keys, *(key for fact in _SHARED for key in present[fact])}.intersection(keys)
        )
        self._sorts: dict[Any, _Sort] = {}
        self.shared: Callable[[Mapping[str, Any]], Any] = itemgetter(*self._asked) if self._asked else _nothing
        self.response_id = present["response_id"]
        self.counts = [(fact, present[fact]) for fact in _COUNTS if present[fact]]
        self.seconds = [(fact, present[fact]) for fact in _SECONDS if present[fact]]
        asked = not dialect.refine_if or any(key in keys for key in dialect.refine_if)
        self.refine = dialect.refine if asked else None

    def sort(self, attributes: Mapping[str, Any], *, root: bool) -> _Sort:
        """Kind, status, label, workflow, role, model and endpoint of a span: what it shares with others like it."""
        shared = self.shared(attributes), root
        try:
            sort = self._sorts.get(shared)
        except TypeError:
            # A list where there should be a name.
            return self._look(attributes, root=root)
        if sort is None:
            sort = self._look(attributes, root=root)
            if sum(len(value) for key in self._asked if isinstance(value := attributes[key], str)) <= _LONGEST_SHARED:
                if len(self._sorts) >= _MOST_SORTS:
                    self._sorts.clear()
                self._sorts[shared] = sort
        return sort

    def _look(self, attributes: Mapping[str, Any], *, root: bool) -> _Sort:
        keys = self._keys
        kind = self._dialect.kind(attributes)
        if kind == WORKFLOW and self._dialect.workflows_are_roots and not root:
            kind = STEP
        status = FAILED if text(attributes, keys["error"]) else OK
        workflow = text(attributes, keys["workflow"])
        if kind not in CALL_LIKE:
            return kind, status, text(attributes, keys["label"]), workflow, "", "", ""
        endpoint = text(attributes, keys["address"])
        port = number(attributes[keys["port"][0]]) if keys["port"] and endpoint else None
        if port is not None:
            endpoint = f"{endpoint}:{int(port)}"
        return kind, status, "", workflow, text(attributes, keys["role"]), text(attributes, keys["model"]), endpoint


def _nothing(_attributes: Mapping[str, Any]) -> None:
    return None


def translate(raw: RawSpan, plan: Plan) -> SpanRecord:
    """The span in Scepsy's words."""
    attributes, parent, name = raw.attributes, raw.parent, raw.name
    kind, status, label, workflow, role, model, endpoint = plan.sort(attributes, root=not parent)
    call = kind in CALL_LIKE
    record = SpanRecord(
        raw.trace, raw.id, parent, name, kind, raw.start_ns, raw.end_ns, FAILED if raw.failed else status,
        raw.remote_parent, label or ("" if call else name[:_LONGEST_NAME]), workflow, role, model, endpoint,
    )  # fmt: skip
    if call:
        if kind == LLM:
            record.scope = raw.scope
            record.process = raw.process
        keys = plan.response_id
        if keys:
            # The first key holds what it should in all but odd spans, and there are millions of spans.
            value = attributes[keys[0]]
            usual = value.__class__ is str and 0 < len(value) <= _LONGEST_NAME
            record.response_id = value if usual else text(attributes, keys)
        for fact, keys in plan.counts:
            value = attributes[keys[0]]
            usual = value.__class__ is int and 0 <= value < _LARGEST
            setattr(record, fact, value if usual else _first_number(attributes, keys, int))
        for fact, keys in plan.seconds:
            setattr(record, fact, _first_number(attributes, keys, float))
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

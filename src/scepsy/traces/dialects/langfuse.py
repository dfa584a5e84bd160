"""Langfuse: its SDK's spans, and its exports, which the reader of exports brings into the same names."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from scepsy.traces.dialects.frameworks import with_purpose
from scepsy.traces.dialects.table import Dialect, Keys, number
from scepsy.traces.records import AGENT, FAILED, LLM, STEP, TOOL, WORKFLOW, RawSpan, SpanRecord
from scepsy.traces.times import parse_time_ns

TYPE: Final = "langfuse.observation.type"
MODEL: Final = "langfuse.observation.model.name"
USAGE: Final = "langfuse.observation.usage_details"
FIRST_CHUNK_AT: Final = "langfuse.observation.completion_start_time"
LEVEL: Final = "langfuse.observation.level"
METADATA: Final = "langfuse.observation.metadata"
TRACE_NAME: Final = "langfuse.trace.name"

_KINDS: Final = {"generation": LLM, "embedding": LLM, "tool": TOOL, "retriever": TOOL, "agent": AGENT}
_CLIENTS_OWN = {"input": "prompt_tokens", "output": "completion_tokens"}
_SIDES = ("input", "output")
_READ_FROM_CACHE = (
    "input_cache_read",
    "cache_read_input_tokens",
    "input_cached_tokens",
    "input_cached",
    "cached_tokens",
)


def _kind(raw: RawSpan) -> str:
    kind = raw.attributes[TYPE]
    kind = kind.lower() if isinstance(kind, str) else ""
    if kind in ("span", "chain", "event"):
        return STEP if raw.parent or kind == "event" else WORKFLOW
    return _KINDS.get(kind, STEP)


def _refine(raw: RawSpan, record: SpanRecord) -> SpanRecord:
    changed: dict[str, Any] = {}
    if raw.attributes.get(LEVEL) == "ERROR":
        changed["status"] = FAILED
    if record.kind != LLM:
        return with_purpose(record._replace(**changed) if changed else record)
    usage = _parsed(raw.attributes.get(USAGE))
    if isinstance(usage, dict):
        details = usage.get("prompt_tokens_details")
        changed["cached_tokens"] = _sum(details if isinstance(details, dict) else usage, _READ_FROM_CACHE)
        changed["input_tokens"] = _inclusive(usage, "input")
        changed["output_tokens"] = _inclusive(usage, "output")
    first = parse_time_ns(_parsed(raw.attributes.get(FIRST_CHUNK_AT)))
    if first > raw.start_ns:
        changed["time_to_first_token_s"] = (first - raw.start_ns) / 1e9
    if not record.model:
        metadata = _parsed(raw.attributes.get(METADATA))
        model = metadata.get("ls_model_name") if isinstance(metadata, dict) else None
        changed["model"] = model if isinstance(model, str) else ""
    return record._replace(**changed)


def _inclusive(usage: dict[str, Any], side: str) -> int | None:
    """Tokens of one side. Langfuse's buckets are disjoint: cached or reasoning tokens are not within the plain ones.

    Where plain input and output make up the total already, or have the client's own names, they were counted
    inclusively.
    """
    from_client = number(usage.get(_CLIENTS_OWN[side]))
    if from_client is not None:
        return int(from_client)
    plain = number(usage.get(side))
    total = number(usage.get("total"))
    if plain is not None and total is not None and total == sum(number(usage.get(key)) or 0 for key in _SIDES):
        return int(plain)
    found = [number(value) for key, value in usage.items() if key == side or key.startswith(f"{side}_")]
    if side == "input":
        found += [number(usage.get("cache_read_input_tokens")), number(usage.get("cache_creation_input_tokens"))]
    known = [int(value) for value in found if value is not None]
    return sum(known) if known else None


def _sum(usage: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    known = [int(value) for value in (number(usage.get(key)) for key in keys) if value is not None]
    return sum(known) if known else None


def _parsed(value: object) -> Any:
    """Attributes are JSON in text; exports hold the values themselves."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.MsgspecError, RecursionError):
        return value


DIALECT: Final = Dialect(
    name="Langfuse",
    marks=(TYPE,),
    kind=_kind,
    keys=Keys(
        workflow=(TRACE_NAME,),
        model=(MODEL, "gen_ai.request.model"),
        address=("server.address",),
        port=("server.port",),
    ),
    also=(USAGE, FIRST_CHUNK_AT, LEVEL, METADATA),
    refine=_refine,
)

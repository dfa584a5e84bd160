"""Langfuse: its SDK's spans, and its exports, which the reader of exports brings into the same names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec

from scepsy.traces.dialects.frameworks import keep_purpose
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
_STEPS = frozenset({"span", "chain", "event"})
_READ_FROM_CACHE = (
    "input_cache_read",
    "cache_read_input_tokens",
    "input_cached_tokens",
    "input_cached",
    "cached_tokens",
)


def _kind(attributes: Mapping[str, Any]) -> str:
    kind = attributes[TYPE]
    kind = kind.lower() if isinstance(kind, str) else ""
    if kind in _STEPS:
        return STEP if kind == "event" else WORKFLOW
    return _KINDS.get(kind, STEP)


def _refine(raw: RawSpan, record: SpanRecord) -> None:
    attributes = raw.attributes
    if attributes.get(LEVEL) == "ERROR":
        record.status = FAILED
    if record.kind != LLM:
        keep_purpose(record)
        return
    usage = _parsed(attributes.get(USAGE))
    if isinstance(usage, dict):
        input_keys, output_keys, cached_keys, plain = _buckets(tuple(usage))
        if cached_keys:
            record.cached_tokens = _sum(usage, cached_keys)
        if plain:
            record.input_tokens = _sum(usage, input_keys)
            record.output_tokens = _sum(usage, output_keys)
        else:
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict):
                record.cached_tokens = _sum(details, _READ_FROM_CACHE)
            record.input_tokens = _inclusive(usage, "input", input_keys)
            record.output_tokens = _inclusive(usage, "output", output_keys)
    if FIRST_CHUNK_AT in attributes:
        first_ns = parse_time_ns(_parsed(attributes[FIRST_CHUNK_AT]))
        if first_ns > raw.start_ns:
            record.time_to_first_token_s = (first_ns - raw.start_ns) / 1e9
    if not record.model:
        metadata = _parsed(attributes.get(METADATA))
        model = metadata.get("ls_model_name") if isinstance(metadata, dict) else None
        record.model = model if isinstance(model, str) else ""


@lru_cache(maxsize=4096)
def _buckets(keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], bool]:
    """Which of the keys count tokens of the input, of the output, and tokens read from a cache.

    The last one says that these keys alone tell all, so that each side is the sum of its own.
    """

    def of(side: str) -> tuple[str, ...]:
        return tuple(key for key in keys if key == side or key.startswith(f"{side}_"))

    cache = tuple(key for key in ("cache_read_input_tokens", "cache_creation_input_tokens") if key in keys)
    cached = tuple(key for key in _READ_FROM_CACHE if key in keys)
    plain = not {"total", "prompt_tokens_details", *_CLIENTS_OWN.values()}.intersection(keys)
    return of("input") + cache, of("output"), cached, plain


def _inclusive(usage: dict[str, Any], side: str, buckets: tuple[str, ...]) -> int | None:
    """Tokens of one side. Langfuse's buckets are disjoint: cached or reasoning tokens are not within the plain ones.

    Where plain input and output make up the total already, or have the client's own names, they were counted
    inclusively.
    """
    if _CLIENTS_OWN[side] in usage:
        from_client = number(usage[_CLIENTS_OWN[side]])
        if from_client is not None:
            return int(from_client)
    if "total" in usage:
        plain, total = number(usage.get(side)), number(usage["total"])
        if plain is not None and total is not None and total == sum(number(usage.get(key)) or 0 for key in _SIDES):
            return int(plain)
    return _sum(usage, buckets)


def _sum(usage: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    """The sum of the counts under `keys`, None where there is none."""
    if len(keys) == 1:
        count = number(usage.get(keys[0]))
        return None if count is None else int(count)
    counts = [int(count) for key in keys if (count := number(usage.get(key))) is not None]
    return sum(counts) if counts else None


_decode = msgspec.json.Decoder().decode


def _parsed(value: object) -> Any:
    """Attributes are JSON in text; exports hold the values themselves."""
    if not isinstance(value, str):
        return value
    try:
        return _decode(value)
    except (msgspec.MsgspecError, RecursionError):
        return value


DIALECT: Final = Dialect(
    name="Langfuse",
    marks=(TYPE,),
    kind=_kind,
    workflows_are_roots=True,
    kind_keys=(TYPE,),
    keys=Keys(
        workflow=(TRACE_NAME,),
        model=(MODEL, "gen_ai.request.model"),
        address=("server.address",),
        port=("server.port",),
    ),
    also=(USAGE, FIRST_CHUNK_AT, LEVEL, METADATA),
    refine=_refine,
)

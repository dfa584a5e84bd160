"""Traceloop's OpenLLMetry, in its older names and its newer ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from scepsy.semconv import LLM_OPERATIONS
from scepsy.traces.dialects.frameworks import keep_purpose
from scepsy.traces.dialects.table import Dialect, Keys
from scepsy.traces.records import AGENT, LLM, STEP, TOOL, WORKFLOW, RawSpan, SpanRecord

_FIRST_CHUNKS = frozenset({"gen_ai.content.completion.chunk", "llm.content.completion.chunk"})
_MARKS = ("traceloop.span.kind", "traceloop.entity.path", "traceloop.workflow.name", "llm.request.type")
_KINDS: Final = {"workflow": WORKFLOW, "agent": AGENT, "tool": TOOL, "task": STEP}
_REQUESTS = frozenset({"chat", "completion", "embedding", "rerank"})


def _kind(attributes: Mapping[str, Any]) -> str:
    if _named(attributes, "gen_ai.operation.name") in LLM_OPERATIONS:
        return LLM
    if _named(attributes, "llm.request.type") in _REQUESTS:
        return LLM
    return _KINDS.get(_named(attributes, "traceloop.span.kind"), STEP)


def _named(attributes: Mapping[str, Any], key: str) -> str:
    value = attributes.get(key)
    return value if isinstance(value, str) else ""


def _refine(raw: RawSpan, record: SpanRecord) -> None:
    if record.kind != LLM:
        keep_purpose(record)
        return
    if record.time_to_first_token_s is not None or not raw.events:
        return
    chunks = [event.time_ns for event in raw.events if event.name in _FIRST_CHUNKS]
    # There is an event per chunk, and the SDK keeps only the newest 128: the first that is left may not be the first.
    if chunks and len(raw.events) < 128:
        record.time_to_first_token_s = max(0, min(chunks) - raw.start_ns) / 1e9


DIALECT: Final = Dialect(
    name="Traceloop",
    marks=_MARKS,
    kind=_kind,
    kind_keys=("gen_ai.operation.name", "llm.request.type", "traceloop.span.kind"),
    keys=Keys(
        label=("traceloop.entity.name", "gen_ai.agent.name", "gen_ai.tool.name"),
        workflow=("traceloop.workflow.name",),
        model=("gen_ai.request.model", "llm.request.model", "gen_ai.response.model", "llm.response.model"),
        address=("server.address", "gen_ai.openai.api_base", "llm.openai.api_base"),
        port=("server.port",),
        response_id=("gen_ai.response.id",),
        input_tokens=("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.usage.prompt_tokens"),
        output_tokens=("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.usage.completion_tokens"),
        cached_tokens=("gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens"),
        time_to_first_token_s=("gen_ai.response.time_to_first_chunk",),
        error=("error.type",),
    ),
    refine=_refine,
)

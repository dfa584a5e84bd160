"""Traceloop's OpenLLMetry, in its older names and its newer ones."""

from __future__ import annotations

from typing import Final

from scepsy.semconv import LLM_OPERATIONS
from scepsy.traces.dialects.frameworks import with_purpose
from scepsy.traces.dialects.table import Dialect, Keys, text
from scepsy.traces.records import AGENT, LLM, STEP, TOOL, WORKFLOW, RawSpan, SpanRecord

_FIRST_CHUNKS = frozenset({"gen_ai.content.completion.chunk", "llm.content.completion.chunk"})
_MARKS = ("traceloop.span.kind", "traceloop.entity.path", "traceloop.workflow.name", "llm.request.type")
_KINDS: Final = {"workflow": WORKFLOW, "agent": AGENT, "tool": TOOL, "task": STEP}
_REQUESTS = frozenset({"chat", "completion", "embedding", "rerank"})


def _kind(raw: RawSpan) -> str:
    attributes = raw.attributes
    operation = text(attributes, ("gen_ai.operation.name",))
    if operation in LLM_OPERATIONS or text(attributes, ("llm.request.type",)) in _REQUESTS:
        return LLM
    return _KINDS.get(text(attributes, ("traceloop.span.kind",)), STEP)


def _refine(raw: RawSpan, record: SpanRecord) -> SpanRecord:
    if record.kind != LLM:
        return with_purpose(record)
    if record.time_to_first_token_s is not None:
        return record
    if not raw.events:
        return record
    chunks = [event.time_ns for event in raw.events if event.name in _FIRST_CHUNKS]
    # There is an event per chunk, and the SDK keeps only the newest 128: the first that is left may not be the first.
    if not chunks or len(raw.events) >= 128:
        return record
    return record._replace(time_to_first_token_s=max(0, min(chunks) - raw.start_ns) / 1e9)


DIALECT: Final = Dialect(
    name="Traceloop",
    marks=_MARKS,
    kind=_kind,
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
    also=("gen_ai.operation.name",),
    refine=_refine,
)

"""OpenInference: Arize's conventions, as Phoenix and its instrumentations write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from scepsy.traces.dialects.frameworks import keep_purpose
from scepsy.traces.dialects.table import Dialect, Keys, text
from scepsy.traces.records import AGENT, LLM, STEP, TOOL, WORKFLOW, RawSpan, SpanRecord

EARLY_END: Final = "streamed calls that were recorded as ending before their first token, so that they seem short"

_FIRST_CHUNK = "First Token Stream Event"
_KINDS: Final = {"LLM": LLM, "TOOL": TOOL, "RETRIEVER": TOOL, "AGENT": AGENT}


def _kind(attributes: Mapping[str, Any]) -> str:
    kind = attributes["openinference.span.kind"]
    kind = kind.upper() if isinstance(kind, str) else ""
    if kind == "EMBEDDING":
        return LLM if attributes.get("embedding.model_name") else STEP
    if kind == "RERANKER":
        return LLM if attributes.get("reranker.model_name") else STEP
    if kind == "CHAIN":
        return WORKFLOW
    return _KINDS.get(kind, STEP)


def _refine(raw: RawSpan, record: SpanRecord) -> None:
    if record.kind != LLM:
        keep_purpose(record)
        return
    record.detached = not raw.parent
    if not record.model:
        # Spans of failed calls have the request's parameters only.
        record.model = _requested_model(raw.attributes)
    if not raw.events:
        return
    first_ns = next((event.time_ns for event in raw.events if event.name == _FIRST_CHUNK), 0)
    if first_ns > raw.start_ns:
        record.time_to_first_token_s = (first_ns - raw.start_ns) / 1e9
        if first_ns > raw.end_ns > 0:
            # The end is when the generator was returned, not when it was read.
            record.end_ns = first_ns
            record.flaw = EARLY_END


def _requested_model(attributes: Mapping[str, Any]) -> str:
    written = attributes.get("llm.invocation_parameters")
    try:
        given = msgspec.json.decode(written) if isinstance(written, str) else {}
    except (msgspec.MsgspecError, RecursionError):
        return ""
    return text(given, ("model", "model_name")) if isinstance(given, dict) else ""


DIALECT: Final = Dialect(
    name="OpenInference",
    marks=("openinference.span.kind",),
    kind=_kind,
    workflows_are_roots=True,
    kind_keys=("openinference.span.kind", "embedding.model_name", "reranker.model_name"),
    keys=Keys(
        label=("agent.name", "tool.name", "graph.node.name", "graph.node.id"),
        model=("llm.request.model_name", "llm.model_name", "embedding.model_name", "reranker.model_name"),
        address=("server.address",),
        port=("server.port",),
        response_id=("gen_ai.response.id",),
        input_tokens=("llm.token_count.prompt",),
        output_tokens=("llm.token_count.completion",),
        cached_tokens=("llm.token_count.prompt_details.cache_read",),
    ),
    also=("llm.invocation_parameters",),
    refine=_refine,
)

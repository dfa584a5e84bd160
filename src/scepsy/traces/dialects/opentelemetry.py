"""OpenTelemetry's semantic conventions for generative AI, with Scepsy's additions, and spans of no dialect at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from scepsy import semconv
from scepsy.traces.dialects.table import Dialect, Keys, number
from scepsy.traces.records import (
    AGENT,
    CALL,
    FAILED,
    FROM_CACHE,
    INTERRUPTED,
    LLM,
    OK,
    STEP,
    TOOL,
    TRANSPORT,
    WORKFLOW,
    RawSpan,
    SpanRecord,
)

_KINDS: Final = {
    semconv.INVOKE_WORKFLOW: WORKFLOW,
    semconv.INVOKE_AGENT: AGENT,
    semconv.EXECUTE_TOOL: TOOL,
    "retrieval": TOOL,
    **dict.fromkeys(semconv.LLM_OPERATIONS, LLM),
}
_OWN_KINDS: Final = {
    semconv.KIND_WORKFLOW: WORKFLOW,
    semconv.KIND_AGENT: AGENT,
    semconv.KIND_TOOL: TOOL,
    semconv.KIND_STEP: STEP,
    semconv.KIND_LLM: LLM,
    CALL: CALL,
}
_OUTCOMES: Final = {"cancelled": FAILED, "interrupted": INTERRUPTED, "abandoned": INTERRUPTED}


def _kind(attributes: Mapping[str, Any]) -> str:
    asked = attributes.get
    if asked(semconv.TRANSPORT) == True:  # noqa: E712 - 1 counts as well, text does not
        return TRANSPORT
    own = asked(semconv.KIND)
    if isinstance(own, str) and own in _OWN_KINDS:
        return _OWN_KINDS[own]
    operation = asked(semconv.OPERATION)
    return _KINDS.get(operation, STEP) if isinstance(operation, str) else STEP


def _refine(raw: RawSpan, record: SpanRecord) -> None:
    attributes = raw.attributes
    outcome = attributes.get(semconv.OUTCOME)
    if isinstance(outcome, str):
        record.status = _OUTCOMES.get(outcome, record.status)
    if record.kind != LLM:
        return
    if attributes.get(semconv.CACHE_HIT) is True:
        record.status = FROM_CACHE
    elif outcome == "abandoned" and record.output_tokens is not None:
        # Nobody read the stream to its end, but up to there it was a call like any other.
        record.status = OK
    wasted_s, waited_s = number(attributes.get(semconv.WASTED_S)), number(attributes.get(semconv.RETRY_WAIT_S))
    if wasted_s or waited_s:
        record.lost_s = (wasted_s or 0.0) + (waited_s or 0.0)


DIALECT: Final = Dialect(
    name="OpenTelemetry",
    marks=(),
    kind=_kind,
    kind_keys=(semconv.TRANSPORT, semconv.KIND, semconv.OPERATION),
    keys=Keys(
        label=(semconv.AGENT_NAME, semconv.TOOL_NAME, semconv.WORKFLOW_NAME),
        workflow=(semconv.WORKFLOW_NAME,),
        role=(semconv.ROLE,),
        model=(semconv.REQUEST_MODEL, semconv.RESPONSE_MODEL),
        address=(semconv.SERVER_ADDRESS,),
        port=(semconv.SERVER_PORT,),
        response_id=(semconv.RESPONSE_ID,),
        input_tokens=(semconv.INPUT_TOKENS, "gen_ai.usage.prompt_tokens"),
        output_tokens=(semconv.OUTPUT_TOKENS, "gen_ai.usage.completion_tokens", semconv.OUTPUT_CHUNKS),
        cached_tokens=(semconv.CACHED_TOKENS,),
        time_to_first_token_s=(semconv.TIME_TO_FIRST_CHUNK_S,),
        queue_s=(semconv.QUEUE_S,),
        error=(semconv.ERROR_TYPE,),
    ),
    refine=_refine,
    refine_if=(semconv.OUTCOME, semconv.CACHE_HIT, semconv.WASTED_S, semconv.RETRY_WAIT_S),
)

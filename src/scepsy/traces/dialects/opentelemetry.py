"""OpenTelemetry's semantic conventions for generative AI, with Scepsy's additions, and spans of no dialect at all."""

from __future__ import annotations

from typing import Final

from scepsy import semconv
from scepsy.traces.dialects.table import Dialect, Keys
from scepsy.traces.records import AGENT, LLM, STEP, TOOL, TRANSPORT, WORKFLOW, RawSpan

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
}


def _kind(raw: RawSpan) -> str:
    attributes = raw.attributes
    if attributes.get(semconv.TRANSPORT) is True:
        return TRANSPORT
    own = attributes.get(semconv.KIND)
    if isinstance(own, str) and own in _OWN_KINDS:
        return _OWN_KINDS[own]
    operation = attributes.get(semconv.OPERATION)
    return _KINDS.get(operation, STEP) if isinstance(operation, str) else STEP


def _any(raw: RawSpan) -> bool:
    """Every span: one that names nothing is a step."""
    return bool(raw.id)


DIALECT: Final = Dialect(
    name="OpenTelemetry",
    recognises=_any,
    kind=_kind,
    keys=Keys(
        label=(semconv.AGENT_NAME, semconv.TOOL_NAME, semconv.WORKFLOW_NAME),
        workflow=(semconv.WORKFLOW_NAME,),
        role=(semconv.ROLE,),
        session=("gen_ai.conversation.id",),
        model=(semconv.REQUEST_MODEL, semconv.RESPONSE_MODEL),
        address=(semconv.SERVER_ADDRESS,),
        port=(semconv.SERVER_PORT,),
        response_id=(semconv.RESPONSE_ID,),
        input_tokens=(semconv.INPUT_TOKENS, "gen_ai.usage.prompt_tokens"),
        output_tokens=(semconv.OUTPUT_TOKENS, "gen_ai.usage.completion_tokens"),
        cached_tokens=(semconv.CACHED_TOKENS,),
        time_to_first_token_s=(semconv.TIME_TO_FIRST_CHUNK_S,),
        queue_s=(semconv.QUEUE_S,),
        error=(semconv.ERROR_TYPE,),
    ),
)

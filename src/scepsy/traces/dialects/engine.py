"""The spans that serving engines make of their own requests: vLLM, SGLang and TensorRT-LLM share these names.

vLLM also traces its own start, in spans that name nothing but a place in its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from scepsy.traces.dialects.table import Dialect, Keys, text
from scepsy.traces.records import ENGINE_START, SERVER, STEP, RawSpan, SpanRecord


def _kind(_attributes: Mapping[str, Any]) -> str:
    return SERVER


def _refine(raw: RawSpan, record: SpanRecord) -> None:
    # vLLM's V1 engine names no model: what the service was called is the next best.
    record.model = record.model or text(raw.resource, ("service.name",))
    record.detached = not raw.parent


DIALECT: Final = Dialect(
    name="engine",
    marks=("gen_ai.latency.e2e", "gen_ai.latency.time_in_queue", "gen_ai.latency.time_to_first_token"),
    kind=_kind,
    kind_keys=(),
    keys=Keys(
        model=("gen_ai.request.model", "gen_ai.response.model"),
        response_id=("gen_ai.request.id",),
        input_tokens=("gen_ai.usage.prompt_tokens", "gen_ai.usage.input_tokens"),
        output_tokens=("gen_ai.usage.completion_tokens", "gen_ai.usage.output_tokens"),
        cached_tokens=("gen_ai.usage.cached_tokens", "gen_ai.usage.cache_read.input_tokens"),
        time_to_first_token_s=("gen_ai.latency.time_to_first_token",),
        queue_s=("gen_ai.latency.time_in_queue",),
    ),
    refine=_refine,
)


def _kind_of_code(attributes: Mapping[str, Any]) -> str:
    return ENGINE_START if text(attributes, ("code.namespace",)).startswith("vllm.") else STEP


START: Final = Dialect(
    name="engine start",
    marks=("code.namespace", "code.function", "code.filepath", "code.lineno"),
    kind=_kind_of_code,
    kind_keys=("code.namespace",),
    keys=Keys(),
    alone=True,
)

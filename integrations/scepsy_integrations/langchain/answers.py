"""What an answer of LangChain's models tells: tokens, model, id, and whether it came from a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scepsy import semconv
from scepsy.capture import Handle

if TYPE_CHECKING:
    from langchain_core.outputs import LLMResult


def describe(handle: Handle, response: LLMResult) -> None:
    """Note tokens and identity, unless the server itself has told them already."""
    if handle.kind != semconv.KIND_LLM:
        return
    attributes = handle.attributes
    message = None
    if response.generations and response.generations[0]:
        message = getattr(response.generations[0][0], "message", None)
    output: dict[str, Any] = response.llm_output or {}
    usage = getattr(message, "usage_metadata", None)
    if usage:
        if usage.get("total_cost") == 0 and not output:  # LangChain's mark of an answer from its own cache
            attributes[semconv.CACHE_HIT] = True
        attributes.setdefault(semconv.INPUT_TOKENS, usage.get("input_tokens", 0))
        attributes.setdefault(semconv.OUTPUT_TOKENS, usage.get("output_tokens", 0))
        cached = (usage.get("input_token_details") or {}).get("cache_read")
        if cached is not None:
            attributes.setdefault(semconv.CACHED_TOKENS, cached)
        reasoning = (usage.get("output_token_details") or {}).get("reasoning")
        if reasoning is not None:
            attributes.setdefault(semconv.REASONING_TOKENS, reasoning)
    else:
        counts = output.get("token_usage") or {}
        if counts.get("prompt_tokens") is not None:
            attributes.setdefault(semconv.INPUT_TOKENS, counts["prompt_tokens"])
            attributes.setdefault(semconv.OUTPUT_TOKENS, counts.get("completion_tokens") or 0)
    about = getattr(message, "response_metadata", None) or output
    if about.get("model_name"):
        attributes.setdefault(semconv.RESPONSE_MODEL, str(about["model_name"]))
    if about.get("id"):
        attributes.setdefault(semconv.RESPONSE_ID, str(about["id"]))

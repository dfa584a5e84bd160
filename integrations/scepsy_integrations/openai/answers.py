"""What an answer of an OpenAI-compatible server tells: model, id, tokens, the server's own timings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from scepsy import semconv
from scepsy.capture import Exchange, harmless

_NOTHING: Final[dict[str, Any]] = {}
_CHAT_USAGE: Final = ("prompt_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details")
_RESPONSES_USAGE: Final = ("input_tokens", "output_tokens", "input_tokens_details", "output_tokens_details")


@harmless
def describe(exchange: Exchange, answer: Any) -> None:
    """Note model, id, tokens and server timings of a complete answer."""
    if is_raw(answer):
        answer = answer.parse()
    known = fields(answer)
    note_identity(exchange, known)
    usage = known.get("usage")
    if usage is not None:
        note_usage(exchange, usage)
    extra = extras(answer)
    if extra:
        note_timings(exchange, extra)


def is_raw(answer: Any) -> bool:
    """Whether it is what `with_raw_response` returns: the body is there, not yet parsed."""
    return type(answer).__name__ == "LegacyAPIResponse"


def fields(value: Any) -> dict[str, Any]:
    """The fields of one of openai's models, or of the dictionary that it was made from.

    Read past the model: asking it for a field that it lacks raises inside pydantic, which takes longer than all else.
    """
    return value if type(value) is dict else getattr(value, "__dict__", _NOTHING)


def extras(value: Any) -> Mapping[str, Any] | None:
    """What the server has sent that openai's model has no field for."""
    return value if type(value) is dict else getattr(value, "__pydantic_extra__", None)


def note_identity(exchange: Exchange, known: Mapping[str, Any]) -> None:
    """Note which model answered, and the answer's id."""
    attributes = exchange.handle.attributes
    model, name = known.get("model"), known.get("id")
    if isinstance(model, str):
        attributes[semconv.RESPONSE_MODEL] = model
    if isinstance(name, str):
        attributes[semconv.RESPONSE_ID] = name


def note_usage(exchange: Exchange, usage: Any) -> None:
    """Note tokens, in the words of the chat and completions APIs or in those of the responses API."""
    known = fields(usage)
    chat = known.get("prompt_tokens") is not None or known.get("completion_tokens") is not None
    given, made, details_given, details_made = _CHAT_USAGE if chat else _RESPONSES_USAGE
    if known.get(given) is None and known.get(made) is None:
        return
    exchange.note(semconv.INPUT_TOKENS, known.get(given))
    exchange.handle.attributes[semconv.OUTPUT_TOKENS] = known.get(made) or 0
    details = known.get(details_given)
    if details is not None:
        exchange.note(semconv.CACHED_TOKENS, fields(details).get("cached_tokens"))
    details = known.get(details_made)
    if details is not None:
        exchange.note(semconv.REASONING_TOKENS, fields(details).get("reasoning_tokens"))


def note_timings(exchange: Exchange, extra: Mapping[str, Any]) -> None:
    """Note what the server says of its own time, where it does."""
    metrics = extra.get("metrics")
    if isinstance(metrics, Mapping):  # vLLM, with --enable-per-request-metrics
        queue_ms = metrics.get("queue_time_ms")
        if queue_ms is not None:
            exchange.note(semconv.QUEUE_S, queue_ms / 1e3)
        spent = [metrics.get("time_to_first_token_ms"), metrics.get("generation_time_ms")]
        known = [float(value) for value in spent if value is not None]
        if known:
            exchange.note(semconv.EXECUTION_S, sum(known) / 1e3)
    timings = extra.get("timings")
    if isinstance(timings, Mapping) and "predicted_ms" in timings:  # llama.cpp
        exchange.note(semconv.EXECUTION_S, (timings.get("prompt_ms", 0.0) + timings["predicted_ms"]) / 1e3)

"""Requests of the emulated API: bodies checked, turned into prompts and lengths. Errors are worded as vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scepsy.emulator.answers import DEFAULT_MAX_TOKENS, MESSAGE_TOKENS, content_tokens, text_tokens


class RequestError(Exception):
    """A request that vLLM answers with an error body."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape, as vLLM writes it."""
        kinds = {400: "BadRequestError", 404: "NotFoundError"}
        return {
            "error": {
                "message": str(self),
                "type": kinds.get(self.status, "InternalServerError"),
                "param": self.param,
                "code": self.status,
            }
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """What a chat or completion request asks for: `choices` answers to each prompt, given in tokens."""

    prompts: tuple[int, ...]
    choices: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    """Whether every piece of a stream tells the tokens so far, as vLLM's `continuous_usage_stats` asks."""


def parse_chat(body: Mapping[str, Any], max_model_len: int) -> Generate:
    """A chat completion's request. Raises RequestError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError("messages: a list of messages is required", param="messages")
    prompt = sum(MESSAGE_TOKENS + content_tokens(message.get("content")) for message in messages)
    return _generate(
        body, (max(1, prompt),), body.get("max_completion_tokens") or body.get("max_tokens"), max_model_len
    )


def parse_completion(body: Mapping[str, Any], max_model_len: int) -> Generate:
    """A completion's request: a text, token ids, or a list of either. Raises RequestError."""
    return _generate(body, _prompts(body.get("prompt"), "prompt"), body.get("max_tokens"), max_model_len)


def parse_embeddings(body: Mapping[str, Any], max_model_len: int) -> tuple[int, ...]:
    """An embedding request's inputs in tokens. Raises RequestError."""
    prompts = _prompts(body.get("input"), "input")
    for prompt in prompts:
        _check_length(prompt, 0, max_model_len)
    return prompts


def _generate(body: Mapping[str, Any], prompts: tuple[int, ...], limit: object, max_model_len: int) -> Generate:
    room = max_model_len - max(prompts)
    max_tokens = _integer(limit, "max_tokens", min(DEFAULT_MAX_TOKENS, max(1, room)), least=1)
    for prompt in prompts:
        _check_length(prompt, max_tokens, max_model_len)
    min_tokens = _integer(body.get("min_tokens"), "min_tokens", 0, least=0)
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.", param="min_tokens"
        )
    options = body.get("stream_options")
    told: Mapping[str, Any] = options if isinstance(options, Mapping) else {}
    return Generate(
        prompts=prompts,
        choices=_integer(body.get("n"), "n", 1, least=1),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=bool(body.get("ignore_eos")),
        stream=bool(body.get("stream")),
        include_usage=bool(told.get("include_usage")),
        continuous_usage=bool(told.get("include_usage") and told.get("continuous_usage_stats")),
    )


def _prompts(value: object, param: str) -> tuple[int, ...]:
    if isinstance(value, str):
        return (text_tokens(value),)
    if isinstance(value, list) and value:
        if all(isinstance(item, int) for item in value):
            return (len(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(text_tokens(item) for item in value)
        if all(isinstance(item, list) and item for item in value):
            return tuple(len(item) for item in value)
    raise RequestError(f"{param}: a text, token ids, or a list of either is required", param=param)


def _check_length(prompt: int, output: int, max_model_len: int) -> None:
    if prompt + output <= max_model_len:
        return
    raise RequestError(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {output} output tokens "
        f"and your prompt contains at least {prompt} input tokens, for a total of at least {prompt + output} tokens. "
        "Please reduce the length of the input prompt or the number of requested output tokens.",
        param="input_tokens",
    )


def _integer(value: object, param: str, default: int, *, least: int) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{param} must be an integer of at least {least}, got {value!r}.", param=param)
    return value

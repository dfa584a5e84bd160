"""Prompts and answers of LangChain's models, where the user has asked for them to be recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from scepsy.capture import message, text_parts, tool_call, tool_response

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage
    from langchain_core.outputs import LLMResult

    from scepsy.capture.content import Message

_ROLES: Final = {"human": "user", "ai": "assistant", "AIMessageChunk": "assistant"}


def said(one: BaseMessage, finish_reason: str | None = None) -> Message:
    """A message of LangChain's as the conventions have it."""
    role = _ROLES.get(one.type, one.type)
    parts = text_parts(one.content)
    if role == "tool":
        parts = [tool_response(parts, getattr(one, "tool_call_id", None))]
    for wish in getattr(one, "tool_calls", None) or ():
        parts.append(tool_call(wish["name"], wish["args"], wish["id"]))
    return message(role, parts, finish_reason)


def answers(response: LLMResult) -> list[Message]:
    """What a model has answered."""
    made = []
    for generation in response.generations[0] if response.generations else ():
        reason = (generation.generation_info or {}).get("finish_reason")
        one: Any = getattr(generation, "message", None)
        made.append(message("assistant", text_parts(generation.text), reason) if one is None else said(one, reason))
    return made

"""Prompts and answers of LlamaIndex's models, where the user has asked for them to be recorded."""

from __future__ import annotations

from typing import Any

from scepsy.capture import message, text_parts, tool_call, tool_response
from scepsy.capture.content import Message


def said(one: Any) -> Message:
    """A ChatMessage as the conventions have it."""
    role = str(getattr(one.role, "value", one.role))
    known = one.additional_kwargs
    wishes = [block for block in one.blocks if block.block_type == "tool_call"]
    parts = text_parts([block for block in one.blocks if block.block_type != "tool_call"])
    if role == "tool":
        parts = [tool_response(parts, known.get("tool_call_id"))]
    for wish in wishes:
        parts.append(tool_call(wish.tool_name, wish.tool_kwargs, wish.tool_call_id))
    for wish in () if wishes else known.get("tool_calls") or ():  # as older versions keep them
        function = getattr(wish, "function", None)
        if function is not None:
            parts.append(tool_call(function.name, function.arguments, wish.id))
    return message(role, parts)


def answer(response: Any) -> Message:
    """What a model has answered: a ChatResponse, or a CompletionResponse."""
    one = getattr(response, "message", None)
    return message("assistant", text_parts(response.text)) if one is None else said(one)

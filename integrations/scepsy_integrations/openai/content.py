"""Prompts and answers of openai's APIs, where the user has asked for them to be recorded."""

from __future__ import annotations

from typing import Any

from scepsy import semconv
from scepsy.capture import Exchange, Handle, message, note_content, settings, text_parts, tool_call, tool_response
from scepsy.capture.content import Message, Part
from scepsy_integrations.openai.answers import fields


def records_content(exchange: Exchange) -> bool:
    """Whether the content is to be recorded here, rather than by the framework whose call the exchange carries."""
    return settings.record_content and exchange.owned


def note_question(handle: Handle, body: dict[str, Any]) -> None:
    """Record the prompt of a request."""
    if "messages" in body or "prompt" in body or handle.attributes[semconv.OPERATION] == semconv.CHAT:
        note_content(handle, semconv.INPUT_MESSAGES, lambda: _questions(body))


def note_answer(handle: Handle, answer: Any) -> None:
    """Record a complete answer."""
    note_content(handle, semconv.OUTPUT_MESSAGES, lambda: _answers(fields(answer)))


def _questions(body: dict[str, Any]) -> list[Message]:
    if "messages" in body:
        return [_message(fields(one)) for one in body["messages"]]
    if "prompt" in body:
        prompt = body["prompt"]
        prompts = prompt if isinstance(prompt, list) and not all(isinstance(one, int) for one in prompt) else [prompt]
        return [message("user", _prompt(one)) for one in prompts]
    instructions, given = body.get("instructions"), body.get("input")
    said = [message("system", text_parts(instructions))] if instructions else []
    if isinstance(given, str):
        return [*said, message("user", text_parts(given))]
    return [*said, *(_item(fields(one)) for one in given or ())]


def _prompt(prompt: Any) -> list[Part]:
    return text_parts(prompt) if isinstance(prompt, str) else [{"type": "tokens"}]


def _answers(answer: dict[str, Any]) -> list[Message]:
    if "output" in answer:  # of the responses API
        return [_item(fields(one)) for one in answer["output"] or ()]
    said = []
    for choice in answer.get("choices") or ():
        known = fields(choice)
        reason = known.get("finish_reason")
        if known.get("message") is None:
            said.append(message("assistant", text_parts(known.get("text")), reason))
        else:
            said.append(_message(fields(known["message"]), reason))
    return said


def _message(known: dict[str, Any], finish_reason: str | None = None) -> Message:
    role = str(known.get("role") or "assistant")
    parts = text_parts(known.get("content"))
    if role == "tool":
        parts = [tool_response(parts, known.get("tool_call_id"))]
    for call in known.get("tool_calls") or ():
        wish = fields(call)
        function = fields(wish.get("function") or wish.get("custom"))
        arguments = function.get("arguments") or function.get("input") or ""
        parts.append(tool_call(str(function.get("name")), arguments, wish.get("id")))
    return message(role, parts, finish_reason)


def _item(known: dict[str, Any]) -> Message:
    """An item of the responses API: a message, a tool's call, what it returned, or something else."""
    kind = known.get("type")
    if kind == "function_call":
        part = tool_call(str(known.get("name")), known.get("arguments") or "", known.get("call_id"))
        return message("assistant", [part])
    if kind == "function_call_output":
        returned = known.get("output")
        return message("tool", [tool_response(text_parts(returned), known.get("call_id"))])
    if "content" in known and "role" in known:
        return message(str(known["role"]), text_parts(known["content"]))
    return message("assistant", [{"type": str(kind or "other")}])


class Spoken:
    """An answer put together again from the pieces in which it was streamed."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._choices: dict[int, dict[str, Any]] = {}
        self._response: Any = None

    def add(self, piece: dict[str, Any]) -> None:
        """One piece more."""
        whole = piece.get("response")  # events of the responses API hold all of it, at the end complete
        if whole is not None:
            self._response = whole
        for choice in piece.get("choices") or ():
            known = fields(choice)
            so_far = self._choices.setdefault(known.get("index") or 0, {"texts": [], "calls": {}, "reason": None})
            so_far["reason"] = known.get("finish_reason") or so_far["reason"]
            delta = known.get("delta")
            made = fields(delta) if delta is not None else {"content": known.get("text")}
            if made.get("content"):
                so_far["texts"].append(made["content"])
            for call in made.get("tool_calls") or ():
                self._add_call(so_far["calls"], fields(call))

    def _add_call(self, calls: dict[int, dict[str, str]], call: dict[str, Any]) -> None:
        so_far = calls.setdefault(call.get("index") or 0, {"id": "", "name": "", "arguments": ""})
        function = fields(call.get("function"))
        so_far["id"] += call.get("id") or ""
        so_far["name"] += function.get("name") or ""
        so_far["arguments"] += function.get("arguments") or ""

    def note(self) -> None:
        """Record what has come."""
        if self._response is not None:
            note_answer(self._handle, self._response)
        elif self._choices:
            note_content(self._handle, semconv.OUTPUT_MESSAGES, self._messages)

    def _messages(self) -> list[Message]:
        said = []
        for _, choice in sorted(self._choices.items()):
            parts = text_parts("".join(choice["texts"]))
            parts += [tool_call(call["name"], call["arguments"], call["id"]) for call in choice["calls"].values()]
            said.append(message("assistant", parts, choice["reason"]))
        return said

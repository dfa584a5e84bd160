"""What was said, as OpenTelemetry's conventions write it: recorded only where the user asked, once redacted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from opentelemetry import context as context_api

from scepsy.capture.handle import Handle
from scepsy.capture.recorder import SUPPRESS_KEY
from scepsy.capture.safety import harmless
from scepsy.capture.settings import settings

Part = dict[str, Any]
Message = dict[str, Any]

_TEXTS: Final = ("content", "arguments", "response")
"""The fields of a part that hold what was said."""


@harmless
def note_content(handle: Handle, key: str, messages: Callable[[], Iterable[Message]]) -> None:
    """Record `messages` under `key`, every text of them as the user's redaction returns it.

    The messages are made here, so that an error in making or redacting them costs their record and nothing else.
    """
    if not settings.record_content:
        return
    # What redaction itself does is not recorded: it may ask a model, whose prompt would be redacted, and so on.
    token = context_api.attach(context_api.set_value(SUPPRESS_KEY, value=True))
    try:
        said = _said(messages)
    finally:
        context_api.detach(token)
    if said:
        handle.attributes[key] = json.dumps(said, ensure_ascii=False)


def _said(messages: Callable[[], Iterable[Message]]) -> list[Message]:
    return [{**one, "parts": [kept for part in one["parts"] if (kept := _redacted(part))]} for one in messages()]


def _redacted(part: Part) -> Part | None:
    redact = settings.redact
    if redact is None:
        return part
    kept = dict(part)
    for name in _TEXTS:
        if name in kept:
            text = redact(kept[name])
            if text is None:
                return None
            if not isinstance(text, str):
                raise TypeError("redact returned neither a text nor None")
            kept[name] = text
    return kept


def message(role: str, parts: list[Part], finish_reason: str | None = None) -> Message:
    """Something said by `role`: "system", "user", "assistant" or "tool"."""
    said: Message = {"role": role, "parts": parts}
    if finish_reason is not None:
        said["finish_reason"] = finish_reason
    return said


def text_parts(content: Any) -> list[Part]:
    """The parts of a message's content: of one text, or of a list of blocks as frameworks and servers have them.

    Of a block without a text (an image, a sound) only its type is kept.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "content": content}] if content else []
    return [_part(block) for block in content]


def _part(block: Any) -> Part:
    if isinstance(block, str):
        return {"type": "text", "content": block}
    known = block if isinstance(block, Mapping) else getattr(block, "__dict__", {})
    text = known.get("text")
    if isinstance(text, str):
        return {"type": "text", "content": text}
    return {"type": str(known.get("type") or known.get("block_type") or "other")}


def tool_call(name: str, arguments: Any, identity: str | None = None) -> Part:
    """A model's wish to call a tool."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, default=str)
    return {"type": "tool_call", "id": identity, "name": name, "arguments": text}


def tool_response(parts: list[Part], identity: str | None = None) -> Part:
    """What a tool has returned to a model."""
    text = "".join(part.get("content", "") for part in parts)
    return {"type": "tool_call_response", "id": identity, "response": text}

"""How vLLM words an answer: chat completions and completions, whole and in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """The kind of answer that an endpoint gives."""

    prefix: str
    kind: str
    chunk_kind: str
    is_chat: bool

    def choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        """One whole choice."""
        end: dict[str, Any] = {"logprobs": None, "finish_reason": reason, "stop_reason": None}
        if not self.is_chat:
            return {"index": index, "text": text, **end}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
        return {"index": index, "message": message, **end}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's choice: who speaks."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """The next piece of a choice; `reason` on its last one."""
        content = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", is_chat=True)
COMPLETION = Shape("cmpl", "text_completion", "text_completion", is_chat=False)

"""What a router must pass on unchanged: requests that vLLM takes, each with what the routers tried did to it."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.endpoint_load import MODEL

CHAT: Final = "/v1/chat/completions"
_USER: Final = {"role": "user", "content": "x"}
_TOOL: Final = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}
_IMAGE: Final = {"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "u1", "cache_control": {"type": "e"}}
_CALL: Final = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_TOOL_ANSWER: Final = {"role": "tool", "tool_call_id": "1", "name": "f", "content": "x"}
_HEADERS: Final = {
    "Authorization": "Bearer t",
    "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
    "tracestate": "v=1",
    "baggage": "session.id=1",
    "X-Session-Id": "s",
    "X-Request-Id": "r",
    "X-Own": "o",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request: its body, or what of it is to be seen, and its headers."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    path: str = CHAT
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """As it is sent; the spaces are not those that a serialiser would write."""
        chat = {"messages": [_USER]} if self.path == CHAT else {}
        return json.dumps({"model": MODEL, **chat, **self.fields}, separators=(" , ", " : ")).encode()


CASES: Final = (
    Case(
        name="vLLM's own parameters",
        fields={"vllm_xargs": {"a": 1}, "top_k": 3, "priority": 1, "kv_transfer_params": {}, "unknown": [None]},
    ),
    Case(
        name="reasoning in the history",
        fields={"messages": [_USER, {"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "c"}]},
    ),
    Case(
        name="tool message with name, content null",
        fields={"messages": [_USER, {"role": "assistant", "content": None, "tool_calls": [_CALL]}, _TOOL_ANSWER]},
    ),
    Case(name="strict tools", fields={"tools": [_TOOL]}),
    Case(name="image with uuid, cache_control", fields={"messages": [{"role": "user", "content": [_IMAGE]}]}),
    Case(
        name="response_format structural_tag",
        fields={"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
    ),
    Case(
        name="temperature 3, a role of one's own",
        fields={"temperature": 3.0, "messages": [{**_USER, "role": "critic"}]},
    ),
    Case(name="token ids as prompt", fields={"prompt": [1, 2, 3]}, path="/v1/completions"),
    Case(name="/v1/responses, unknown field", fields={"input": "x", "unknown": 1}, path="/v1/responses"),
    Case(name="/v1/messages", fields={"messages": [_USER], "max_tokens": 9, "top_k": 1}, path="/v1/messages"),
    Case(name="/v1/embeddings", fields={"input": ["x"], "truncate_prompt_tokens": 1}, path="/v1/embeddings"),
    Case(name="/rerank", fields={"query": "x", "documents": ["y"], "top_n": 1}, path="/rerank"),
    Case(name="/v1/rerank", fields={"query": "x", "documents": ["y"], "top_n": 1}, path="/v1/rerank"),
    Case(name="/score", fields={"text_1": "x", "text_2": "y"}, path="/score"),
    Case(name="/pooling", fields={"input": "x"}, path="/pooling"),
    Case(name="/tokenize", fields={"prompt": "x"}, path="/tokenize"),
    Case(name="/inference/v1/generate", fields={"token_ids": [1]}, path="/inference/v1/generate"),
    Case(name="request headers", headers=_HEADERS),
)


def judge(port: int, case: Case) -> str:
    """Send the case to a router in front of an echo; says "ok", or what became of it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        headers = {"Content-Type": "application/json", **case.headers}
        connection.request("POST", case.path, case.body, headers)
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()
    if answer.status != 200:
        return str(answer.status)
    try:
        said = json.loads(text)
        return _compare(case, said["head"], base64.b64decode(said["body"]))
    except (ValueError, KeyError, TypeError):
        return "another answer"


def _compare(case: Case, head: str, received: bytes) -> str:
    first, *lines = head.split("\r\n")
    found = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    lost = [name for name, value in case.headers.items() if (name.lower(), value) not in found]
    words = []
    if first.split()[1] != case.path:
        words.append(f"path {first.split()[1]}")
    if lost:
        words.append(f"lost {', '.join(lost)}")
    if received != case.body:
        words.append(_difference(json.loads(case.body), json.loads(received)))
    return "; ".join(words) or "ok"


def _difference(sent: Any, received: Any, at: str = "") -> str:
    """What is gone or changed, else what was added; a rewritten body is never `ok`, even where it means the same."""
    gone = _gone(sent, received, at)
    if gone:
        return f"lost {', '.join(gone)}"
    added = sorted(received.keys() - sent.keys()) if isinstance(received, dict) else []
    return f"added {', '.join(added)}" if added else "rewritten"


def _gone(sent: Any, received: Any, at: str) -> list[str]:
    if isinstance(sent, dict) and isinstance(received, dict):
        return [
            place
            for key, value in sent.items()
            for place in ([f"{at}{key}"] if key not in received else _gone(value, received[key], f"{at}{key}."))
        ]
    if isinstance(sent, list) and isinstance(received, list) and len(sent) == len(received):
        return [place for one, other in zip(sent, received, strict=True) for place in _gone(one, other, at)]
    return [] if sent == received else [at.rstrip(".")]

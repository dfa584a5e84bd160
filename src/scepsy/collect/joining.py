"""Which execution does a call belong to that says nothing of executions?

First what its caller says: W3C `traceparent`, then a header that names a conversation. Where neither is there, calls of
one client that follow each other without a long pause are taken together, and marked as inferred.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

BY_TRACEPARENT: Final = "traceparent"
BY_HEADER: Final = "header"
BY_INFERENCE: Final = "inferred"

CONVERSATION_HEADERS: Final = (
    "x-scepsy-execution",
    "x-session-id",
    "x-conversation-id",
    "x-thread-id",
    "session-id",
    "session_id",
    "conversation-id",
    "conversation_id",
    "x-claude-code-session-id",
)
# W3C baggage: what tracers pass on of a session.
_SESSION_IN_BAGGAGE: Final = re.compile(
    r"(?:^|,)\s*(?:session\.id|gen_ai\.conversation\.id|langfuse[._]session[._]id)\s*=\s*([^,;\s]+)", re.IGNORECASE
)
WORKFLOW_HEADER: Final = "x-scepsy-workflow"
HEADER_GAP_S: Final = 60.0
INFERRED_GAP_S: Final = 10.0

_TRACEPARENT: Final = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A call's place: its trace, the span above it, and how that is known."""

    trace: str
    parent: str
    joined_by: str
    sampled: str = "01"
    key: str = ""


@dataclass(slots=True, kw_only=True)
class Group:
    """Calls taken together as one execution. Times in nanoseconds since the epoch."""

    trace: str
    root: str
    joined_by: str
    workflow: str
    gap_s: float
    start_ns: int
    end_ns: int
    running: int = 0


class Joiner:
    """Keeps the open executions of a proxy. Bounded: one entry per execution with a call in its last pause."""

    def __init__(self, *, header_gap_s: float = HEADER_GAP_S, inferred_gap_s: float = INFERRED_GAP_S) -> None:
        self._header_gap_s = header_gap_s
        self._inferred_gap_s = inferred_gap_s
        self._groups: dict[str, Group] = {}
        self._finished: list[Group] = []

    def join(self, headers: Mapping[str, str], client: str, now_ns: int) -> Membership:
        """The place of a call that begins now. `client` is the address of the caller."""
        found = _TRACEPARENT.match(headers.get("traceparent", ""))
        if found and set(found[1]) != {"0"} and set(found[2]) != {"0"}:
            return Membership(trace=found[1], parent=found[2], joined_by=BY_TRACEPARENT, sampled=found[3])
        for name in CONVERSATION_HEADERS:
            if value := headers.get(name):
                return self._enter(_key(name, value), BY_HEADER, self._header_gap_s, headers, now_ns)
        if session := _SESSION_IN_BAGGAGE.search(headers.get("baggage", "")):
            return self._enter(_key("baggage", session[1]), BY_HEADER, self._header_gap_s, headers, now_ns)
        who = (client, headers.get("user-agent", ""), headers.get("authorization", ""))
        return self._enter(_key(*who), BY_INFERENCE, self._inferred_gap_s, headers, now_ns)

    def leave(self, place: Membership, now_ns: int) -> None:
        """The call has ended."""
        group = self._groups.get(place.key)
        if group is not None and group.trace == place.trace:
            group.running -= 1
            group.end_ns = max(group.end_ns, now_ns)

    def finished(self, now_ns: int, *, everything: bool = False) -> list[Group]:
        """Executions that are over, each told once: nothing of them runs, and their pause is too long.

        Or, at the end, `everything`.
        """
        for key, group in list(self._groups.items()):
            if everything or (group.running == 0 and now_ns - group.end_ns > group.gap_s * 1e9):
                self._finished.append(self._groups.pop(key))
        found, self._finished = self._finished, []
        return found

    def _enter(self, key: str, joined_by: str, gap_s: float, headers: Mapping[str, str], now_ns: int) -> Membership:
        group = self._groups.get(key)
        if group is not None and group.running == 0 and now_ns - group.end_ns > gap_s * 1e9:
            self._finished.append(self._groups.pop(key))
            group = None
        if group is None:
            group = self._groups[key] = Group(
                trace=secrets.token_hex(16),
                root=secrets.token_hex(8),
                joined_by=joined_by,
                workflow=readable(headers.get(WORKFLOW_HEADER, "")),
                gap_s=gap_s,
                start_ns=now_ns,
                end_ns=now_ns,
            )
        group.running += 1
        return Membership(trace=group.trace, parent=group.root, joined_by=joined_by, key=key)


def readable(header: str) -> str:
    """What a header says, as UTF-8 can hold it: bytes that are no UTF-8 have come as lone surrogates."""
    return header.encode(errors="replace").decode()


def _key(*parts: str) -> str:
    """Names a conversation or client without keeping what it is called, or its credentials."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

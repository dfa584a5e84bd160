"""Which requests should meet the same replica: those of a session, or those whose prompts begin alike.

A replica keeps the beginnings of prompts that it has computed; a request that comes back to it computes only what is
new. Keys are spread over the replicas by weighted rendezvous hashing: when a replica comes or goes, only its own keys
move.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from scepsy_optimizer.errors import ScepsyError

_PREFIX_CHARACTERS: Final = 2048
_SESSION: Final = "session:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Affinity:
    """By what requests belong together: the value of a header, or the beginning of the prompt."""

    by: Literal["header", "prefix"]
    header: str = ""

    @classmethod
    def parsed(cls, text: str) -> Affinity:
        """From "session:HEADER" or "prefix". Raises ScepsyError."""
        if text == "prefix":
            return cls(by="prefix")
        if text.startswith(_SESSION) and len(text) > len(_SESSION):
            return cls(by="header", header=text.removeprefix(_SESSION))
        raise ScepsyError(f"affinity {text!r}: write session:HEADER, such as session:x-session-id, or prefix")

    def key(self, headers: Mapping[str, str], content: Mapping[str, Any] | None) -> str | None:
        """What requests that belong together have in common; None for one that belongs to no others."""
        if self.by == "header":
            return headers.get(self.header)
        if content is None:
            return None
        start = content.get("prompt") or content.get("messages") or content.get("input")
        if not start:
            return None
        text = start if isinstance(start, str) else json.dumps(start)
        return text[:_PREFIX_CHARACTERS]


def score(key: str, backend_id: str, weight: float) -> float:
    """How much a key prefers a replica; the greatest wins, each as often as its weight says (rendezvous hashing)."""
    digest = hashlib.blake2b(f"{backend_id}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    # In (0, 1]: its logarithm is finite.
    drawn = (int.from_bytes(digest) + 1) / 2**64
    return math.inf if drawn == 1 else -weight / math.log(drawn)

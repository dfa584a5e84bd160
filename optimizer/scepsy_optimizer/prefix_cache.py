"""The prefix cache of one engine: which finished contexts are still there for requests that continue them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Prefix:
    tokens: int = 0
    pins: int = 0


class PrefixCache:
    """Contexts by name, in what the running sequences leave of the KV cache; the least recently used go first.

    A prefix is pinned while a sequence runs on it. Of an evicted one its end goes first, as vLLM frees blocks.
    """

    def __init__(self, kv_tokens: int) -> None:
        self._kv_tokens = kv_tokens
        self._prefixes: dict[Hashable, _Prefix] = {}
        self._kept: OrderedDict[Hashable, _Prefix] = OrderedDict()  # those without a pin, longest unused first
        self._kept_tokens = 0
        self.pinned_tokens = 0
        """Tokens of prefixes that running sequences use."""

    def tokens(self, name: Hashable) -> int:
        """Tokens that are there of a prefix."""
        prefix = self._prefixes.get(name)
        return 0 if prefix is None else prefix.tokens

    def cost_of_pin(self, name: Hashable) -> int:
        """Tokens by which `pinned_tokens` grows when the prefix is pinned."""
        prefix = self._kept.get(name)
        return 0 if prefix is None else prefix.tokens

    def pin(self, name: Hashable) -> None:
        """Keep a prefix, whatever there is of it, until as many unpins."""
        prefix = self._prefixes.setdefault(name, _Prefix())
        if self._kept.pop(name, None) is not None:
            self.pinned_tokens += prefix.tokens
            self._kept_tokens -= prefix.tokens
        prefix.pins += 1

    def unpin(self, name: Hashable, context: int) -> None:
        """A sequence on the prefix has ended with that context, which stays if it is longer than what was there."""
        prefix = self._prefixes[name]
        if context > prefix.tokens:
            self.pinned_tokens += context - prefix.tokens
            prefix.tokens = context
        prefix.pins -= 1
        if prefix.pins == 0:
            self.pinned_tokens -= prefix.tokens
            self._kept_tokens += prefix.tokens
            self._kept[name] = prefix

    def shrink(self, other_tokens: int) -> None:
        """Evict until everything fits beside `other_tokens` that sequences hold of their own."""
        while self._kept and (excess := self._kept_tokens + self.pinned_tokens + other_tokens - self._kv_tokens) > 0:
            name, prefix = next(iter(self._kept.items()))
            gone = min(excess, prefix.tokens)
            prefix.tokens -= gone
            self._kept_tokens -= gone
            if prefix.tokens == 0:
                del self._kept[name], self._prefixes[name]

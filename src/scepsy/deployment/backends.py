"""Which replica takes the next request of an LLM: the one with the least outstanding work for its size."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from scepsy.deployment.affinity import score

_BOUNDED_LOAD: Final = 1.25
_DRAIN_POLL_S: Final = 0.02


@dataclass(slots=True, kw_only=True)
class Backend:
    """A replica as the gateway sees it. `weight` is how much it can do beside others, such as its device fraction."""

    id: str
    llm: str
    url: str
    weight: float = 1.0
    ready: bool = False
    failed: bool = False
    """Given up: it will not be ready again."""
    outstanding: int = 0
    outstanding_beside: int = 0
    """Of others than the gateway, which share the replica with it."""
    served: int = 0


class NoBackendError(Exception):
    """No replica can take the request now."""


@dataclass(slots=True)
class Pool:
    """All replicas of one LLM.

    A request that finds none ready waits for at most `wait_s` seconds, at most `max_waiting` at a time.
    """

    backends: list[Backend]
    wait_s: float = 5.0
    max_waiting: int = 1024
    _waiting: int = 0
    _turn: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def waiting(self) -> int:
        """Requests that wait for a replica to be ready."""
        return self._waiting

    def changed(self) -> None:
        """To be called after `ready` or `failed` of a replica has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def add(self, backend: Backend) -> None:
        """Take one more replica in."""
        self.backends.append(backend)
        self.changed()

    def remove(self, backend: Backend) -> None:
        """Take a replica out; nobody must be waiting for its answer any more."""
        self.backends.remove(backend)
        self.changed()

    async def drain(self, backend: Backend, timeout_s: float) -> bool:
        """Wait until a replica, which must not be ready, has answered what it has; False where time ran out."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while backend.outstanding and asyncio.get_running_loop().time() < deadline_s:  # noqa: ASYNC110 - an event would cost every request
            await asyncio.sleep(_DRAIN_POLL_S)
        return not backend.outstanding

    def choose(self, but: Collection[str] = (), key: str | None = None) -> Backend | None:
        """The ready replica, those named in `but` left out, whose outstanding requests are fewest for its weight.

        Equals take turns. With a `key` it is the one that the key prefers, unless that has a quarter more to do than
        its part of all: then the next in the key's order (consistent hashing with bounded loads, arXiv 1608.01350).
        """
        if key is not None:
            return self._preferred(but, key)
        self._turn += 1
        count = len(self.backends)
        best, least = None, float("inf")
        for offset in range(count):
            backend = self.backends[(self._turn + offset) % count]
            load = (backend.outstanding + backend.outstanding_beside + 1) / backend.weight
            if backend.ready and load < least and backend.id not in but:
                best, least = backend, load
        return best

    def _preferred(self, but: Collection[str], key: str) -> Backend | None:
        ready = [backend for backend in self.backends if backend.ready and backend.id not in but]
        ready.sort(key=lambda backend: score(key, backend.id, backend.weight), reverse=True)
        most = _BOUNDED_LOAD * (1 + sum(backend.outstanding + backend.outstanding_beside for backend in ready))
        weight = sum(backend.weight for backend in ready)
        for backend in ready:
            if backend.outstanding + backend.outstanding_beside + 1 <= math.ceil(most * backend.weight / weight):
                return backend
        return None

    async def acquire(self, but: Collection[str] = (), key: str | None = None) -> Backend:
        """The replica to use, waiting for one if need be. Raises NoBackendError."""
        backend = self.choose(but, key)
        if backend is not None:
            return backend
        if self._waiting >= self.max_waiting:
            raise NoBackendError
        self._waiting += 1
        try:
            async with asyncio.timeout(self.wait_s):
                while True:
                    if all(backend.failed for backend in self.backends):
                        raise NoBackendError
                    await self._changed.wait()
                    backend = self.choose(but, key) or self.choose((), key)
                    if backend is not None:
                        return backend
        except TimeoutError:
            raise NoBackendError from None
        finally:
            self._waiting -= 1

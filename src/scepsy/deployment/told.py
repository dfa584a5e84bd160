"""What HAProxy knows of the replicas: told through its runtime socket, from what the pools say."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.haproxy import MAP, SPARE_BACKENDS, Load, backend_names, key_of, loads, tell

_MOST_WEIGHT: Final = 256
_SPARE: Final = "spare-"


@dataclass(slots=True, kw_only=True)
class _Server:
    """A replica as HAProxy knows it."""

    url: str
    weight: int
    is_open: bool = False
    ever: int = 0


class Told:
    """The LLMs and servers that one HAProxy after another is told of."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        """`pools` may change later."""
        self._pools = pools
        self._backends = backend_names(list(pools))
        self._spare = [f"{_SPARE}{number}" for number in range(SPARE_BACKENDS)]
        self._servers: dict[str, _Server] = {}
        self._telling = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        """The backends that its configuration must have."""
        return [*self._backends.values(), *self._spare]

    def forget(self) -> None:
        """Another HAProxy has been started, which knows nothing."""
        self._servers.clear()

    def may_route_to(self, backend: Backend) -> bool:
        """Whether HAProxy may still give requests to a replica, as far as it has been told."""
        server = self._servers.get(self._path(backend))
        return server is not None and server.is_open

    async def sync(self, socket: str, *, is_closed: bool) -> None:
        """Tell all that has changed, and count what HAProxy does into the backends; raises ControlError.

        With `is_closed` it is left no LLM, so that every request goes to the gateway.
        """
        async with self._telling:
            await self._tell_map(socket, is_closed=is_closed)
            await self._tell_servers(socket)
            await self._count(socket)

    async def _tell_map(self, socket: str, *, is_closed: bool) -> None:
        listed = await tell(socket, f"show map {MAP}", "0x")
        there = {line.split()[1] for line in listed.splitlines()}
        wanted: dict[str, str] = {}
        for llm in [llm for llm, name in self._backends.items() if name.startswith(_SPARE) and llm not in self._pools]:
            if not any(path.startswith(f"{self._backends[llm]}/") for path in self._servers):
                self._spare.append(self._backends.pop(llm))
        for llm in [] if is_closed else list(self._pools):
            if llm not in self._backends and self._spare:
                self._backends[llm] = self._spare.pop()
            if llm in self._backends:
                wanted[key_of(llm)] = self._backends[llm]
        for key in there - wanted.keys():
            await tell(socket, f"del map {MAP} {key}")
        for key in wanted.keys() - there:
            await tell(socket, f"add map {MAP} {key} {wanted[key]}")

    async def _tell_servers(self, socket: str) -> None:
        present: set[str] = set()
        # Copies, for replicas come and go while HAProxy answers.
        for llm, pool in list(self._pools.items()):
            most = max((backend.weight for backend in pool.backends), default=1.0)
            for backend in list(pool.backends):
                present.add(self._path(backend))
                if llm in self._backends:
                    weight = max(1, round(_MOST_WEIGHT * backend.weight / most))
                    await self._tell_server(socket, backend, weight)
        for gone in self._servers.keys() - present:
            await tell(socket, f"set server {gone} state maint")
            # What it had has been answered; a connection that is still closing is looked at again.
            if (await tell(socket, f"del server {gone}", "Server deleted", "Server still")).endswith("deleted."):
                del self._servers[gone]

    async def _tell_server(self, socket: str, backend: Backend, weight: int) -> None:
        path, url, is_ready = self._path(backend), backend.url, backend.ready
        address = url.removeprefix("http://")
        server = self._servers.get(path)
        if server is None:
            if not is_ready:
                return
            # Connections are closed before an engine would close them.
            await tell(
                socket,
                f"add server {path} {address} weight {weight} check inter 2s fall 3 rise 1 pool-purge-delay 2s",
                "New server registered",
            )
            await tell(socket, f"enable health {path}")
            server = self._servers[path] = _Server(url=url, weight=weight)
        if server.url != url:
            host, _, port = address.rpartition(":")
            await tell(socket, f"set server {path} addr {host} port {port}", "IP changed", "port changed", "no need")
            server.url = url
        if server.weight != weight:
            await tell(socket, f"set server {path} weight {weight}")
            server.weight = weight
        if server.is_open != is_ready:
            await tell(socket, f"set server {path} state {'ready' if is_ready else 'maint'}")
            server.is_open = is_ready

    async def _count(self, socket: str) -> None:
        counted: dict[str, Load] = dict(loads(await tell(socket, "show stat -1 4 -1", "#")))
        for backend in [backend for pool in self._pools.values() for backend in pool.backends]:
            path = self._path(backend)
            load = counted.get(path, Load(now=0, ever=0))
            backend.outstanding_beside = load.now
            server = self._servers.get(path)
            if server is not None:
                backend.served += load.ever - server.ever
                server.ever = load.ever

    def _path(self, backend: Backend) -> str:
        return f"{self._backends.get(backend.llm, '')}/{backend.id}"

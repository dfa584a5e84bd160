"""The replicas of a deployment: brought up together, kept up, added and retired one by one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.gateway import listed_model
from scepsy.deployment.replica import Replica
from scepsy.deployment.specs import Engine, ReplicaSpec
from scepsy.deployment.state import Kept, Order


class Endpoint(Protocol):
    """What stands in front of the replicas."""

    @property
    def in_flight(self) -> int:
        """Requests that are being forwarded."""

    def watch(self, backend: Backend) -> None:
        """Know of a replica that its pool has got since; pools and models are shared."""

    def forget(self, backend: Backend) -> None:
        """Know no more of a replica that has left its pool."""

    async def empty(self, backend: Backend, timeout_s: float) -> bool:
        """Wait until a replica, which must not be ready, has answered what it has; False where time ran out."""

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, wait for those in flight, and break off those that outlast the time."""


class Fleet:
    """All replicas, and the pools in which the endpoint finds them."""

    def __init__(
        self,
        order: Order,
        *,
        logs: Path,
        session: aiohttp.ClientSession,
        on_change: Callable[[], None],
        on_event: Callable[[str], None],
    ) -> None:
        """`on_change` is called when processes come or go, `on_event` with what people may want to know."""
        self._order = order
        self._logs = logs
        self._session = session
        self._on_change = on_change
        self._on_event = on_event
        self._begun = int(time.time())
        self._turns = Turns(order.engine)
        self._replicas: dict[str, Replica] = {}
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pools: dict[str, Pool] = {}
        self.models: dict[str, Mapping[str, Any]] = {}
        for spec in order.specs:
            self._enlist(self._made(spec))

    @property
    def kept(self) -> tuple[Kept, ...]:
        """The processes of all replicas, for the state file."""
        found = [one.kept for one in self._replicas.values()]
        return tuple(kept for kept in found if kept is not None)

    def status(self, order: Order) -> list[Mapping[str, Any]]:
        """What every replica does now, in plain values: first those of the order, then those that come or go."""
        ids = [spec.id for spec in order.specs if spec.id in self._replicas]
        others = [spec_id for spec_id in self._replicas if spec_id not in ids]
        return [self._replicas[spec_id].status() for spec_id in (*ids, *others)]

    async def start(self) -> None:
        """Bring all up. Raises StartError where one does not come up; nothing of that one is then left."""
        await together(one.start() for one in self._replicas.values())
        for spec_id in self._replicas:
            self._keep(spec_id)

    async def wait(self) -> None:
        """Until keeping a replica fails for a reason that is not the replica's."""
        await self._broken

    async def add(self, spec: ReplicaSpec, endpoint: Endpoint) -> None:
        """Bring one more up, then give it requests. Raises StartError; nothing of it is then left."""
        replica = self._made(spec)
        self._replicas[spec.id] = replica
        try:
            await replica.start()
        except BaseException:
            del self._replicas[spec.id]
            raise
        self._enlist(replica)
        endpoint.watch(replica.backend)
        self._keep(spec.id)

    def add_broken(self, spec: ReplicaSpec, endpoint: Endpoint, reason: str) -> None:
        """Take one in that does not come up: it is tried again as one is that has ended."""
        replica = self._made(spec)
        self._enlist(replica)
        endpoint.watch(replica.backend)
        self._keep(spec.id, reason)

    async def retire(self, spec_id: str, endpoint: Endpoint, drain_s: float) -> None:
        """Give it no more requests, wait for those that it has, end it."""
        keeping = self._keeping.pop(spec_id, None)
        replica = self._replicas[spec_id]
        if keeping is not None:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        backend = replica.backend
        replica.leave()
        await endpoint.empty(backend, drain_s)
        await replica.stop()
        pool = self.pools[backend.llm]
        pool.remove(backend)
        endpoint.forget(backend)
        if not pool.backends:
            del self.pools[backend.llm], self.models[backend.llm]
        del self._replicas[spec_id]

    def rename(self, spec: ReplicaSpec) -> None:
        """Note where the replica of that id lies in the words of another plan, and its weight there."""
        replica = self._replicas[spec.id]
        replica.spec = replace(replica.spec, node=spec.node, devices=spec.devices, weight=spec.weight)
        replica.backend.weight = spec.weight

    def revive(self, spec_id: str) -> None:
        """Try one again that was given up; any other is left as it is."""
        if self._replicas[spec_id].phase == "failed":
            self._keeping[spec_id].cancel()
            self._keep(spec_id, "was given up, and is asked for again")

    async def stop(self) -> None:
        """End all of them and everything that they started."""
        for keeping in self._keeping.values():
            keeping.cancel()
        await asyncio.gather(*self._keeping.values(), return_exceptions=True)
        await asyncio.gather(*(one.stop() for one in self._replicas.values()))

    def _made(self, spec: ReplicaSpec) -> Replica:
        return Replica(
            spec,
            self.pools.get(spec.llm) or Pool([]),
            Backend(id=spec.id, llm=spec.llm, url=spec.url, weight=spec.weight),
            logs=self._logs,
            grace_s=self._order.grace_s,
            start_timeout_s=self._order.start_timeout_s,
            session=self._session,
            turn=self._turns.of(spec),
            on_change=self._on_change,
            on_event=self._on_event,
            upkeep=self._order.upkeep,
        )

    def _enlist(self, replica: Replica) -> None:
        """From now on its LLM is known, and it gets requests while it is ready."""
        spec = replica.spec
        self._replicas[spec.id] = replica
        pool = self.pools.setdefault(spec.llm, replica.pool)
        replica.pool = pool
        pool.add(replica.backend)
        self.models[spec.llm] = listed_model(spec.llm, spec.model, self._begun, spec.max_model_len)

    def _keep(self, spec_id: str, reason: str = "") -> None:
        task = asyncio.create_task(self._replicas[spec_id].keep(reason))
        task.add_done_callback(self._kept)
        self._keeping[spec_id] = task

    def _kept(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._broken.done():
            self._broken.set_exception(error)


class Turns:
    """Who may start when: those that share a device one after another, and only so many at once as there are cores."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._limit = asyncio.Semaphore(_at_once(engine))
        self._locks: dict[tuple[str, int], asyncio.Lock] = {}

    def of(self, spec: ReplicaSpec) -> Callable[[], contextlib.AbstractAsyncContextManager[None]]:
        """What a replica holds while it starts."""
        # Emulators share nothing: only real engines measure the memory that is free when they start.
        places = [] if self._engine == "emulator" else sorted((spec.node, device) for device in spec.devices)
        locks = [self._locks.setdefault(place, asyncio.Lock()) for place in places]

        @asynccontextmanager
        async def turn() -> AsyncIterator[None]:
            async with AsyncExitStack() as stack:
                for lock in locks:
                    await stack.enter_async_context(lock)
                async with self._limit:
                    yield

        return turn


def _at_once(engine: Engine) -> int:
    count = len(os.sched_getaffinity(0))
    # vLLM's start keeps several cores busy for long, an emulator's one for half a second.
    return max(1, {"vllm": count // 4, "vllm-cpu": count // 2, "emulator": 2 * count}[engine])


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all at once; if one fails, the others are cancelled and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None

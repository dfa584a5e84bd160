"""What runs inside Ray: a keeper beside each replica, and a head with the endpoint.

Both do their work on an event loop in a thread of their own, begun when the actor is made: so Ray can make them anew
after a crash, and nobody has to tell them to go on. A keeper holds its engine under a shim; when the keeper's process
is killed, however, the shim ends the engine and all that it started, and the new keeper starts it again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

from aiohttp import web

from scepsy.deployment import machine, processes
from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.connections import connections
from scepsy.deployment.forward import MAX_BODY_BYTES, client, server_options
from scepsy.deployment.gateway import Gateway, listed_model
from scepsy.deployment.on_ray.order import EVERYWHERE, NAMESPACE, PROFILE, RayOrder, RayReplica, keeper_name
from scepsy.deployment.replica import Replica
from scepsy.deployment.shimmed import StartError

T = TypeVar("T")

_LOOK_EVERY_S: Final = 0.5
_AGAIN_S: Final = 5.0
_CALL_TIMEOUT_S: Final = 60.0


class _Looped:
    """An event loop in a thread, on which `_main` runs until it is told to end."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._told = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),), daemon=True)
        self._thread.start()

    async def _main(self) -> None:
        raise NotImplementedError

    def _ask(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    def _end(self) -> None:
        with suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._told.set)
        self._thread.join()


class Keeper(_Looped):
    """Keeps one replica on this node: starts it, watches it, starts it again, ends it."""

    def __init__(self, deployment: str, replica: RayReplica, start_timeout_s: float, grace_s: float) -> None:
        """Begins at once."""
        self._deployment = deployment
        self._order = replica
        self._start_timeout_s = start_timeout_s
        self._grace_s = grace_s
        self._replica: Replica | None = None
        self._failure = ""
        super().__init__()

    def status(self) -> dict[str, Any]:
        """As `Replica.status`, with the node's address in its URL, and the first failure to start, if there was one."""
        if self._replica is None:
            return {"phase": "waiting", "url": "", "failure": self._failure}
        found = dict(self._replica.status())
        port = self._replica.spec.port
        return found | {"url": f"http://{_node_address()}:{port}", "failure": self._failure}

    def stop(self) -> None:
        """End the replica and everything that it started; returns when nothing of it is left."""
        self._end()

    async def _main(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="scepsy-ray-"))
        try:
            async with client() as session:
                spec = self._spec(folder)
                self._replica = replica = Replica(
                    spec,
                    Pool([]),
                    Backend(id=spec.id, llm=spec.llm, url=spec.url),
                    logs=folder,
                    session=session,
                    turn=_no_turn,
                    on_change=lambda: None,
                    on_event=print,
                    start_timeout_s=self._start_timeout_s,
                    grace_s=self._grace_s,
                )
                work = asyncio.ensure_future(self._keep(replica))
                told = asyncio.ensure_future(self._told.wait())
                await asyncio.wait([told, work], return_when=asyncio.FIRST_COMPLETED)
                for task in (told, work):
                    task.cancel()
                await asyncio.gather(told, work, return_exceptions=True)
                await replica.stop()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _keep(self, replica: Replica) -> None:
        while True:
            try:
                await replica.start()
                break
            except StartError as error:
                # The head decides what that means: a first start may be given up, a later one is tried again.
                self._failure = str(error)
                await asyncio.sleep(_AGAIN_S)
        await replica.keep()

    def _spec(self, folder: Path) -> Any:
        """The spec with what only this node knows: a free port, the profile's file, the MPS daemon."""
        order = self._order
        argv = order.spec.argv
        if order.profile is not None:
            file = folder / "profile.yaml"
            file.write_text(order.profile, encoding="utf-8")
            argv = tuple(str(file) if word == PROFILE else word for word in argv)
        env = dict(order.spec.env)
        if order.needs_mps:
            directory = machine.running_mps()
            if directory is None:
                self._failure = (
                    f"{order.spec.id}: node {order.spec.node!r} has no MPS daemon, which fractions of a GPU need; "
                    "start nvidia-cuda-mps-control -d there"
                )
            else:
                env["CUDA_MPS_PIPE_DIRECTORY"] = directory
        return replace(order.spec, argv=argv, env=env).on_port(processes.free_ports(1)[0])


class Head(_Looped):
    """Makes the keepers where they belong, and answers for all of them at one address."""

    def __init__(self, order: RayOrder) -> None:
        """Begins at once; keepers that are there already are taken over."""
        self._order = order
        self._begun = time.time()
        self._port = 0
        self._failure = ""
        self._keepers: dict[str, Any] = {}
        self._seen: dict[str, dict[str, Any]] = {}
        self._backends = {
            one.spec.id: Backend(id=one.spec.id, llm=one.spec.llm, url="", weight=one.spec.weight)
            for one in order.replicas
        }
        super().__init__()

    def status(self) -> dict[str, Any]:
        """What runs now, in plain values, as a local deployment tells it; `address` is that of the endpoint."""
        return self._ask(self._status())

    def stop(self) -> None:
        """Let answers end, and answer no more; keepers are ended by whoever asks for this."""
        self._end()

    async def _status(self) -> dict[str, Any]:
        replicas = []
        for one in self._order.replicas:
            backend, seen = self._backends[one.spec.id], self._seen.get(one.spec.id, {})
            known = {"pid": seen.get("pid"), "restarts": seen.get("restarts", 0), "log": seen.get("log", "")}
            error = seen.get("last_error") or seen.get("failure", "")
            replicas.append(
                {"id": one.spec.id, "llm": one.spec.llm, "phase": seen.get("phase", "waiting"), "place": one.spec.place}
                | {"url": backend.url, "outstanding": backend.outstanding, "served": backend.served}
                | {"last_error": error, **known}
            )
        host = _node_address() if self._order.host == EVERYWHERE else self._order.host
        return {
            "name": self._order.name,
            "engine": self._order.engine,
            "ready": all(backend.ready for backend in self._backends.values()),
            "pid": os.getpid(),
            "up_s": round(time.time() - self._begun, 3),
            "in_flight": sum(backend.outstanding for backend in self._backends.values()),
            "replicas": replicas,
            "address": f"http://{host}:{self._port}" if self._port else "",
            "failure": self._failure,
        }

    async def _main(self) -> None:
        pools: dict[str, Pool] = {}
        models = {}
        for one in self._order.replicas:
            pools.setdefault(one.spec.llm, Pool([])).add(self._backends[one.spec.id])
            models[one.spec.llm] = listed_model(one.spec.llm, one.spec.model, self._begun, one.spec.max_model_len)
        async with connections() as engines:
            status: Mapping[str, Any] = {}

            def shown() -> Mapping[str, Any]:
                return status

            gateway = Gateway(pools, engines, models=models, status=shown)
            app = web.Application(client_max_size=MAX_BODY_BYTES)
            gateway.add_routes(app)
            runner = web.AppRunner(app, shutdown_timeout=0.1, **server_options())
            await runner.setup()
            try:
                try:
                    await web.TCPSite(runner, self._order.host, self._order.port, backlog=1024).start()
                except OSError as error:
                    self._failure = f"cannot listen on {self._order.host}:{self._order.port}: {error.strerror}"
                    await self._told.wait()
                    return
                self._port = int(runner.addresses[0][1])
                while not self._told.is_set():
                    await asyncio.gather(*(self._look(one, pools[one.spec.llm]) for one in self._order.replicas))
                    status = await self._status()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._told.wait(), _LOOK_EVERY_S)
                await gateway.drain(self._order.drain_s)
            finally:
                await runner.cleanup()

    async def _look(self, one: RayReplica, pool: Pool) -> None:
        """Ask a keeper how its replica is, and send requests accordingly."""
        import ray

        backend = self._backends[one.spec.id]
        try:
            keeper = self._keepers.get(one.spec.id)
            if keeper is None:
                keeper = self._keepers[one.spec.id] = self._keeper(one)
            seen = await asyncio.wait_for(_result(keeper.status.remote()), _CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError, ValueError) as error:
            # Killed, and not made anew yet; or its node has gone.
            seen = {"phase": "restarting", "url": backend.url, "last_error": f"{type(error).__name__}"}
            if isinstance(error, ray.exceptions.ActorDiedError):
                self._keepers.pop(one.spec.id, None)
        self._seen[one.spec.id] = seen
        is_ready = seen["phase"] == "ready"
        if (is_ready, seen["url"]) != (backend.ready, backend.url):
            backend.ready, backend.url = is_ready, seen["url"]
            pool.changed()

    def _keeper(self, one: RayReplica) -> Any:
        """The actor beside a replica, made if it is not there, in its placement group."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        title = keeper_name(self._order.name, one.spec.id)
        group = ray.util.get_placement_group(title)
        resources = dict(one.resources)
        return (
            ray.remote(Keeper)
            .options(
                name=title,
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=4,
                num_cpus=resources.get("CPU", 0),
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
            )
            .remote(self._order.name, one, self._order.start_timeout_s, self._order.grace_s)
        )


def _node_address() -> str:
    util: Any = import_module("ray.util")  # its functions have no types
    return str(util.get_node_ip_address())


async def _result(reference: Any) -> dict[str, Any]:
    found: dict[str, Any] = await reference
    return found


@asynccontextmanager
async def _no_turn() -> Any:
    """Ray starts replicas on one device together; vLLM's own memory check is what is left then."""
    yield

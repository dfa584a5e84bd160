"""The process that hosts a deployment: gateway, shims, watch. `python -m scepsy.deployment.controller FOLDER`.

It reads the order from its folder, writes events as JSON lines to its standard output until it is ready, and stops
everything when it is told to, or when its standard input ends before it was told there to go on alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from scepsy.deployment import change, processes
from scepsy.deployment.affinity import Affinity
from scepsy.deployment.changing import carry_out
from scepsy.deployment.connections import Connections, connections
from scepsy.deployment.fleet import Endpoint, Fleet, together
from scepsy.deployment.forward import client
from scepsy.deployment.front import HAProxyFront
from scepsy.deployment.gateway import Gateway
from scepsy.deployment.mps import MpsDaemon
from scepsy.deployment.serving import BACKLOG, listening, served
from scepsy.deployment.shim import raise_file_limit
from scepsy.deployment.shimmed import StartError
from scepsy.deployment.specs import LOOPBACK
from scepsy.deployment.state import API_KEY, DETACH, Order, State, forget, read_order, write_state
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from scepsy.collect.calls import Recorder


class Controller:
    """One deployment, from its order to its end."""

    def __init__(
        self,
        directory: Path,
        order: Order,
        session: aiohttp.ClientSession,
        engines: Connections,
        recorder: Recorder | None = None,
    ) -> None:
        self._directory = directory
        self._order = order
        self._begun = time.time()
        self._port = order.port
        self._ready = False
        self._told = asyncio.Event()
        self._mps: MpsDaemon | None = None
        logs = directory / "logs"
        logs.mkdir(exist_ok=True)
        self._changing: asyncio.Task[None] | None = None
        self._front: HAProxyFront | None = None
        self._fleet = fleet = Fleet(order, logs=logs, session=session, on_change=self._note, on_event=_say)
        api_key = os.environ.pop(API_KEY, None) or None
        affinity = Affinity.parsed(order.affinity) if order.affinity is not None else None
        self.gateway = Gateway(
            fleet.pools,
            engines,
            models=fleet.models,
            status=self.status,
            recorder=recorder,
            affinity=affinity,
            api_key=api_key,
        )
        if order.endpoint == "haproxy":
            self._front = HAProxyFront(
                self.gateway,
                fleet.pools,
                directory=directory,
                api_key=api_key,
                session_header=affinity.header if affinity is not None else None,
                on_change=self._note,
                on_event=_say,
            )
        self.endpoint: Endpoint = self._front or self.gateway

    def status(self) -> Mapping[str, Any]:
        """What runs now, in plain values."""
        return {
            "name": self._order.name,
            "engine": self._order.engine,
            "ready": self._ready,
            "pid": os.getpid(),
            "up_s": round(time.time() - self._begun, 3),
            "in_flight": self.endpoint.in_flight,
            "replicas": self._fleet.status(self._order),
        }

    def end(self) -> None:
        """Make `run` stop everything and return."""
        self._told.set()

    def look(self) -> None:
        """Carry out the changes that were left in the folder, one after another."""
        if self._ready and (self._changing is None or self._changing.done()):
            self._changing = asyncio.create_task(self._change())

    async def run(self) -> None:
        """Serve until told to end. Raises ScepsyError if the start fails; nothing is then left."""
        async with AsyncExitStack() as stack:
            listener = stack.enter_context(listening(self._order.host, self._order.port))
            self._port = int(listener.getsockname()[1])
            await self._answer(stack, listener)
            self._note()
            stack.push_async_callback(self._stop)
            told = asyncio.ensure_future(self._told.wait())
            work = asyncio.ensure_future(self._work())
            await asyncio.wait([told, work], return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        forget(self._directory)

    async def _answer(self, stack: AsyncExitStack, listener: socket.socket) -> None:
        """Take requests on the socket, by the gateway or what is before it."""
        if self._front is None:
            await stack.enter_async_context(served(self.gateway, listener))
            return
        behind = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=BACKLOG))
        await stack.enter_async_context(served(self.gateway, behind))
        try:
            await self._front.start(listener, int(behind.getsockname()[1]))
        except StartError as error:
            raise ScepsyError(str(error)) from None

    async def _work(self) -> None:
        try:
            if self._order.mps_directory is not None:
                await self._start_mps(self._order.mps_directory)
            await self._fleet.start()
        except StartError as error:
            raise ScepsyError(str(error)) from None
        self._ready = True
        report(ready=self._port)
        await together([self._fleet.wait(), *([self._front.wait()] if self._front is not None else [])])

    async def _start_mps(self, directory: str) -> None:
        if self._mps is not None:
            return
        self._mps = MpsDaemon(directory, self._directory / "logs" / "mps.log", on_change=self._note, on_event=_say)
        await self._mps.start()

    async def _change(self) -> None:
        while folders := change.waiting(self._directory):
            done = await carry_out(
                self._directory, folders[0], self._fleet, self.endpoint, start_mps=self._start_mps, on_event=_say
            )
            self._order = done.after if done is not None else self._order
            self._note()

    async def _stop(self) -> None:
        if self._changing is not None:
            self._changing.cancel()
            await asyncio.gather(self._changing, return_exceptions=True)
        # First the answers, then the engines: an engine that is told ends its answers as if they were whole.
        await self.endpoint.drain(self._order.drain_s if self._ready else 0.0)
        await self._fleet.stop()
        if self._mps is not None:
            await self._mps.stop()

    def _note(self) -> None:
        """Write down which processes there are, so that whoever comes after a crash can end them."""
        others = [one.kept for one in (self._mps, self._front) if one is not None]
        kept = [*self._fleet.kept, *others]
        state = State(
            name=self._order.name,
            boot=processes.boot_id(),
            controller=processes.identify(os.getpid()),
            engine=self._order.engine,
            host=self._order.host,
            port=self._port,
            kept=tuple(one for one in kept if one is not None),
        )
        try:
            write_state(self._directory, state)
        except OSError as error:
            # Its processes end with this one all the same; only if their shims are killed as well are they not found.
            _say(f"which processes there are cannot be written down: {error}")
        if self._front is not None:
            self._front.look()


def _say(text: str) -> None:
    report(event=text)


def report(**fields: object) -> None:
    """Tell the starter; it may have gone."""
    try:
        print(json.dumps(fields), flush=True)  # noqa: T201 - the starter reads it
    except BrokenPipeError:
        # Nobody will read it, nor what is left in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if "event" in fields:
        with contextlib.suppress(OSError):  # as on a full disk
            print(f"{time.strftime('%F %T')} {fields['event']}", file=sys.stderr, flush=True)  # noqa: T201 - the log


async def _watch_starter(controller: Controller) -> None:
    """End with the starter, unless it says to go on alone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    if await reader.readline() != DETACH:
        controller.end()


@asynccontextmanager
async def _recorder(order: Order) -> AsyncIterator[Recorder | None]:
    if order.record is None:
        yield None
        return
    from scepsy.collect.calls import Recorder
    from scepsy.collect.store import TraceStore

    store = TraceStore(Path(order.record))
    try:
        recorder = Recorder(store)
        async with recorder.recording():
            yield recorder
    finally:
        await store.close()


async def _main(directory: Path) -> None:
    order = read_order(directory)
    loop = asyncio.get_running_loop()
    async with client() as session, connections() as engines, _recorder(order) as recorder:
        controller = Controller(directory, order, session, engines, recorder)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, controller.end)
        loop.add_signal_handler(signal.SIGUSR1, controller.look)
        watch = asyncio.create_task(_watch_starter(controller))
        try:
            await controller.run()
        finally:
            watch.cancel()


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    directory = Path(sys.argv[1])
    # Each request in flight takes two connections.
    raise_file_limit()
    # The name is free when this process has ended: uvloop would pass its lock on to every shim.
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not paths
        with contextlib.suppress(OSError):
            os.set_inheritable(int(number), int(number) < 3)
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_main(directory))
    except ScepsyError as error:
        forget(directory)
        report(error=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""HAProxy in front of the gateway: started, kept up, and told which replicas there are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import Final

from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.gateway import Gateway
from scepsy.deployment.haproxy import CONTROL, LISTENER, MAP, ControlError, configuration, find_binary
from scepsy.deployment.shimmed import Shimmed, StartError, exit_text
from scepsy.deployment.state import API_KEY, Kept
from scepsy.deployment.told import Told

_LOOK_EVERY_S: Final = 0.5
_POLL_S: Final = 0.05
_READY_S: Final = 60.0
_GRACE_S: Final = 2.0
_AGAIN_S: Final = 1.0
_SOCKET: Final = "haproxy.sock"


class _Control:
    """The socket on which HAProxy is told things: in the deployment's folder, for its owner only.

    It is named by the folder's descriptor, because the path of a socket may have 107 bytes only.
    """

    def __init__(self, directory: Path) -> None:
        (directory / _SOCKET).unlink(missing_ok=True)
        self._file = directory / _SOCKET
        self._folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self.path = f"/proc/self/fd/{self._folder}/{_SOCKET}"
        self.socket = socket(AF_UNIX, SOCK_STREAM)
        self.socket.bind(self.path)
        self._file.chmod(0o600)
        self.socket.listen()

    def close(self) -> None:
        """Nobody is told anything any more; a second time changes nothing."""
        if self.socket.fileno() < 0:
            return
        self.socket.close()
        os.close(self._folder)
        self._file.unlink(missing_ok=True)


class HAProxyFront:
    """The endpoint where HAProxy takes the requests; what it does not take it passes to the gateway."""

    def __init__(
        self,
        gateway: Gateway,
        pools: Mapping[str, Pool],
        *,
        directory: Path,
        api_key: str | None,
        session_header: str | None,
        on_change: Callable[[], None],
        on_event: Callable[[str], None],
    ) -> None:
        """`pools` are the gateway's; configuration and log are put into `directory`.

        `on_change` is called when its process comes or goes, `on_event` with what people may want to know.
        """
        self._gateway = gateway
        self._pools = pools
        self._directory = directory
        self._api_key = api_key
        self._session_header = session_header
        self._on_change = on_change
        self._on_event = on_event
        self._changed = asyncio.Event()
        self._process: Shimmed | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._listener: socket | None = None
        self._told = Told(pools)
        self._binary = ""
        self._control: _Control | None = None
        self._is_closed = False

    @property
    def in_flight(self) -> int:
        """Requests that are being forwarded, by HAProxy or the gateway."""
        return self._gateway.in_flight + sum(backend.outstanding_beside for backend in self._all())

    @property
    def kept(self) -> Kept | None:
        """HAProxy's processes, for the state file."""
        return self._process.kept if self._process is not None else None

    async def start(self, listener: socket, gateway_port: int) -> None:
        """Begin to answer on the socket, and keep doing so. Raises StartError or ScepsyError."""
        self._listener = listener
        self._binary = find_binary()
        self._control = _Control(self._directory)
        text = configuration(
            self._told.names,
            gateway_port,
            threads=len(os.sched_getaffinity(0)),
            has_key=self._api_key is not None,
            session_header=self._session_header,
        )
        (self._directory / MAP).write_text("", encoding="utf-8")
        (self._directory / "haproxy.cfg").write_text(text, encoding="utf-8")
        try:
            await self._launch()
        except BaseException:
            await self._end()
            self._control.close()
            raise
        self._keeping = asyncio.create_task(self._keep())

    def watch(self, backend: Backend) -> None:
        """Route to a replica that its pool has got."""
        self._gateway.watch(backend)
        self.look()

    def forget(self, backend: Backend) -> None:
        """Know no more of a replica that has left its pool."""
        self._gateway.forget(backend)
        self.look()

    def look(self) -> None:
        """To be called when a replica's readiness, address or weight has changed."""
        self._changed.set()

    async def empty(self, backend: Backend, timeout_s: float) -> bool:
        """Wait until a replica, which must not be ready, has answered what it has; False where time ran out."""
        return await self._until_idle([backend], timeout_s) and await self._gateway.empty(backend, _POLL_S)

    async def wait(self) -> None:
        """Until keeping it up fails for a reason that is not HAProxy's."""
        assert self._keeping is not None  # noqa: S101 - it was started
        await asyncio.shield(self._keeping)

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, wait for those in flight, break off those that outlast the time, and end."""
        # All that comes now goes to the gateway, which says that the deployment is stopping.
        self._is_closed = True
        waited = self._until_idle(list(self._all()), timeout_s)
        await asyncio.gather(self._gateway.drain(timeout_s), waited)
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self._end()
        if self._control is not None:
            self._control.close()

    async def _until_idle(self, backends: list[Backend], timeout_s: float) -> bool:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        idle = 0
        # Twice: a request may have been given its replica, and not be counted there yet.
        while idle < 2:
            await self.count()
            idle = 0 if any(map(self._is_busy, backends)) else idle + 1
            if idle < 2:
                if asyncio.get_running_loop().time() > deadline_s:
                    return False
                await asyncio.sleep(_POLL_S)
        return True

    def _is_busy(self, backend: Backend) -> bool:
        """Whether a replica has requests, or may get one although it should not."""
        lives = self._process is not None and not self._process.ended.done()
        may_get = lives and not backend.ready and self._told.may_route_to(backend)
        return may_get or backend.outstanding + backend.outstanding_beside > 0

    async def _keep(self) -> None:
        while True:
            process = self._process
            assert process is not None  # noqa: S101 - it was launched
            changed = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait([process.ended, changed], timeout=_LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            if process.ended.done():
                self._on_event(f"HAProxy ended unasked ({exit_text(process.ended.result())}); starting it again")
                await self._again()
            else:
                await self.count()

    async def _again(self) -> None:
        while True:
            await self._end()
            try:
                await self._launch()
            except (StartError, OSError) as error:
                self._on_event(str(error))
                await asyncio.sleep(_AGAIN_S)
            else:
                return

    async def _launch(self) -> None:
        """Clients that come meanwhile wait: the socket is the controller's."""
        assert self._listener is not None  # noqa: S101 - given at the start
        log = self._directory / "logs" / "haproxy.log"
        assert self._control is not None  # noqa: S101 - likewise
        fds = (self._listener.fileno(), self._control.socket.fileno())
        env = {LISTENER: str(fds[0]), CONTROL: str(fds[1])} | (
            {API_KEY: self._api_key} if self._api_key is not None else {}
        )
        argv = [self._binary, "-db", "-f", str(self._directory / "haproxy.cfg")]
        self._process = process = await Shimmed.launch("haproxy", argv, env, log=log, grace_s=_GRACE_S, pass_fds=fds)
        self._told.forget()
        self._on_change()
        deadline_s = asyncio.get_running_loop().time() + _READY_S
        while True:
            try:
                await self._sync(process)
            except ControlError as error:
                if process.ended.done() or asyncio.get_running_loop().time() > deadline_s:
                    raise StartError(f"HAProxy did not start ({error}); see {log}") from error
                await asyncio.sleep(_POLL_S)
            else:
                return

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.end()
        for backend in self._all():
            backend.outstanding_beside = 0

    async def count(self) -> None:
        """Tell HAProxy at once what has changed, and count what it does.

        While it is being started again there is nothing to tell, nor to count.
        """
        process = self._process
        if process is None or process.ended.done():
            return
        self._changed.clear()
        try:
            await self._sync(process)
        except ControlError as error:
            if not process.ended.done():
                self._on_event(str(error))

    async def _sync(self, process: Shimmed) -> None:
        """Raises ControlError, at once where HAProxy ends meanwhile."""
        assert self._control is not None  # noqa: S101 - made at the start
        telling = asyncio.ensure_future(self._told.sync(self._control.path, is_closed=self._is_closed))
        try:
            await asyncio.wait([telling, process.ended], return_when=asyncio.FIRST_COMPLETED)
            if not telling.done():
                raise ControlError("HAProxy has ended")
        finally:
            telling.cancel()
        await telling

    def _all(self) -> list[Backend]:
        return [backend for pool in self._pools.values() for backend in pool.backends]

"""One replica over its life: start, ready, watched, started again when it ends unasked, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp

from scepsy.deployment import probe, processes, quota
from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.shimmed import START_MARK, Shimmed, StartError, exit_text
from scepsy.deployment.specs import ReplicaSpec
from scepsy.deployment.state import Kept, Upkeep

Phase = Literal["waiting", "starting", "ready", "restarting", "failed", "draining", "stopped"]

LAST_LINES: Final = 20
_LOG_BYTES: Final = 1 << 18  # of the log's end, in which the last start's words are looked for
_POLL_S: Final = (0.05, 0.5)  # between looks at a starting replica, first and longest
_STEADY_S: Final = 600.0  # after this long in service, an end counts as the first again
_OUT_OF_FILES: Final = (errno.EMFILE, errno.ENFILE)

_CAUSE = re.compile(r"\b(?:\w*(?:Error|Exception)\b.*|.*out of memory.*|.*No available memory.*)", re.IGNORECASE)
_NO_CAUSE = re.compile(
    r"Engine core initialization failed|EngineDeadError|^Traceback|RuntimeWarning|DeprecationWarning"
)


class Replica:
    """Keeps one replica of the plan alive, and its backend's readiness true."""

    def __init__(
        self,
        spec: ReplicaSpec,
        pool: Pool,
        backend: Backend,
        *,
        logs: Path,
        grace_s: float,
        start_timeout_s: float,
        session: aiohttp.ClientSession,
        turn: Callable[[], AbstractAsyncContextManager[None]],
        on_change: Callable[[], None],
        on_event: Callable[[str], None],
        upkeep: Upkeep = Upkeep(),  # noqa: B008 - frozen
    ) -> None:
        """`turn` is held while starting: replicas on one device start one after another."""
        self.spec = spec
        self.backend = backend
        self.phase: Phase = "waiting"
        self.restarts = 0
        self.last_error = ""
        self.pool = pool
        self._log = logs / f"{spec.id}.log"
        self._grace_s = grace_s
        self._start_timeout_s = start_timeout_s
        self._session = session
        self._turn = turn
        self._on_change = on_change
        self._on_event = on_event
        self._upkeep = upkeep
        self._process: Shimmed | None = None

    @property
    def kept(self) -> Kept | None:
        """The processes of this replica, for the state file."""
        return self._process.kept if self._process is not None else None

    def status(self) -> Mapping[str, Any]:
        """What it does now, in plain values."""
        engine = self._process.kept.engine if self._process is not None else None
        return {
            "id": self.spec.id,
            "llm": self.spec.llm,
            "phase": self.phase,
            "place": self.spec.place,
            "url": self.spec.url,
            "pid": engine.pid if engine is not None else None,
            "outstanding": self.backend.outstanding + self.backend.outstanding_beside,
            "served": self.backend.served,
            "restarts": self.restarts,
            "last_error": self.last_error,
            "log": str(self._log),
        }

    async def start(self) -> None:
        """Bring it up once. Raises StartError; nothing of it is then left."""
        async with self._turn():
            self._set("starting")
            begun_s = time.monotonic()
            try:
                process = await self._launch()
                await self._until_ready(process, begun_s + self._start_timeout_s)
            except BaseException as error:
                await self._end()
                if not isinstance(error, Exception):
                    raise
                # Whatever stands in the way of one replica is no reason to end the others.
                self.last_error = str(error)
                if not isinstance(error, StartError):
                    self.last_error = f"{self.spec.id}: {error!r}"
                    with contextlib.suppress(OSError):
                        traceback.print_exc()  # into the controller's log
                raise StartError(self.last_error) from error
        self._on_event(f"{self.spec.id} ready after {time.monotonic() - begun_s:.1f} s ({self.spec.place})")
        self._set("ready")

    async def keep(self, broken: str = "") -> None:
        """Watch it for ever; start it again when it ends, the first time at once where `broken` says why it has."""
        early = 0
        while True:
            ready_s = time.monotonic()
            reason = broken or await self._until_broken()
            broken = ""
            self._set("restarting")
            self.last_error = reason
            self._on_event(f"{self.spec.id} {reason}; starting it again")
            await self._end()
            if time.monotonic() - ready_s > _STEADY_S:
                early = 0
            first_s, longest_s = self._upkeep.back_off_s
            failed = 0
            while True:
                await asyncio.sleep(min(longest_s, first_s * 2 ** min(early, 10)))
                self.restarts += 1
                early += 1
                try:
                    await self.start()
                    break
                except StartError as error:
                    self._set("restarting")
                    failed += 1
                    if failed >= self._upkeep.failed_starts:
                        self._set("failed")
                        self._on_event(f"{self.spec.id} given up after {failed} starts that failed. The last: {error}")
                        await asyncio.Event().wait()
                    self._on_event(str(error).splitlines()[0])

    def leave(self) -> None:
        """Get no more requests; those that it has it may end."""
        self._set("draining")

    async def stop(self) -> None:
        """End it and everything that it started."""
        self._set("stopped")
        await self._end()

    def _set(self, phase: Phase) -> None:
        self.phase = phase
        self.backend.ready = phase == "ready"
        self.backend.failed = phase in ("failed", "stopped")
        self.backend.url = self.spec.url
        self.pool.changed()
        self._on_change()

    async def _launch(self) -> Shimmed:
        if not processes.port_is_free(self.spec.port):
            self.spec = self.spec.on_port(processes.free_ports(1)[0])
        spec = self.spec
        launch = asyncio.ensure_future(
            Shimmed.launch(spec.id, spec.argv, spec.env, log=self._log, grace_s=self._grace_s)
        )
        try:
            self._process = await asyncio.shield(launch)
        except asyncio.CancelledError:
            # Half a launch cannot be undone: only what is there can be ended.
            self._process = await launch
            raise
        self._on_change()
        return self._process

    async def _until_ready(self, process: Shimmed, deadline_s: float) -> None:
        """Alive, healthy, serving the right model, and the port's listener is our own."""
        wait_s = _POLL_S[0]
        while True:
            if process.ended.done():
                end = exit_text(process.ended.result())
                raise StartError(
                    f"{self.spec.id} ({self.spec.place}) ended before it was ready ({end}). {self._last_words()}"
                )
            if time.monotonic() > deadline_s:
                raise StartError(
                    f"{self.spec.id} ({self.spec.place}) was not ready after {self._start_timeout_s:g} s. "
                    f"{self._last_words()}"
                )
            if await self._serves() and await asyncio.to_thread(self._owns_port, process):
                break
            # Its end is seen at once, its readiness at the next look.
            await asyncio.wait([process.ended], timeout=wait_s)
            wait_s = min(_POLL_S[1], 1.3 * wait_s)
        if self.spec.core_quota is not None:
            self._limit_workers(process, self.spec.core_quota)

    async def _serves(self) -> bool:
        timeout = aiohttp.ClientTimeout(total=self._upkeep.health_timeout_s)
        try:
            async with self._session.get(f"{self.spec.url}/health", timeout=timeout) as answer:
                if answer.status != 200:
                    return False
            async with self._session.get(f"{self.spec.url}/v1/models", timeout=timeout) as answer:
                models = await answer.json()
                return any(model["id"] == self.spec.llm for model in models["data"])
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return False

    def _owns_port(self, process: Shimmed) -> bool:
        owners = probe.listeners(self.spec.port)
        return bool(owners) and owners <= probe.tree(process.pid)

    def _limit_workers(self, process: Shimmed, part: float) -> None:
        titles = {pid: probe.title(pid) for pid in probe.tree(process.pid)}
        # An engine on one core has no worker apart: it computes itself.
        kind = "VLLM::Worker" if self.spec.tensor_parallel_size > 1 else "VLLM::EngineCore"
        workers = [pid for pid, title in titles.items() if title.startswith(kind)]
        if not workers:
            raise StartError(f"{self.spec.id}: no worker process to limit to {part:g} of its core was found")
        for number, pid in enumerate(workers):
            try:
                quota.limit(self._quota_name(number), pid, part)
            except OSError as error:
                raise StartError(f"{self.spec.id}: cannot limit a worker to {part:g} of its core: {error}") from error

    def _quota_name(self, number: int) -> str:
        return f"scepsy-{self.spec.port}-{number}"

    async def _until_broken(self) -> str:
        """Wait until the engine has ended or does not answer any more; says which."""
        process = self._process
        assert process is not None  # noqa: S101 - it was started
        misses = 0
        while True:
            checking = asyncio.ensure_future(self._checked())
            try:
                await asyncio.wait([process.ended, checking], return_when=asyncio.FIRST_COMPLETED)
                if process.ended.done():
                    return f"ended unasked ({exit_text(process.ended.result())})"
                misses = 0 if checking.result() else misses + 1
            finally:
                checking.cancel()
            if misses >= self._upkeep.health_misses:
                return f"did not answer {misses} health checks"
            # One that is silent gets no requests while another can take them; alone it may only be busy.
            others = any(one.ready for one in self.pool.backends if one is not self.backend)
            is_ready = not misses or not others
            if is_ready != self.backend.ready:
                self.backend.ready = is_ready
                self.pool.changed()

    async def _checked(self) -> bool:
        """Whether it is healthy, a while from now."""
        await asyncio.sleep(self._upkeep.health_every_s)
        timeout = aiohttp.ClientTimeout(total=self._upkeep.health_timeout_s)
        try:
            async with self._session.get(f"{self.spec.url}/health", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            # What this process lacks says nothing of the engine.
            return getattr(error, "errno", None) in _OUT_OF_FILES

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        await process.end()
        if self.spec.core_quota is not None:
            for number in range(self.spec.tensor_parallel_size):
                quota.release(self._quota_name(number))

    def _last_words(self) -> str:
        """The last lines of its last start, and the first error among them that says more than that it failed."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"Its log {self._log} cannot be read ({error.strerror})."
        starts = [number for number, line in enumerate(lines) if line.startswith(START_MARK)]
        own = [line.rstrip() for line in lines[starts[-1] + 1 if starts else 0 :] if line.strip()]
        if not own:
            return f"It wrote nothing to {self._log}."
        causes = [found[0] for line in own if not _NO_CAUSE.search(line) and (found := _CAUSE.search(line))]
        last = own[-LAST_LINES:]
        shown = [f"Cause: {causes[0][:500]}"] if causes and not any(causes[0] in line for line in last) else []
        text = "\n".join(f"  {line[:500]}" for line in [*shown, *last])
        return f"Its last lines, from {self._log}:\n{text}"

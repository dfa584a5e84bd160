"""NVIDIA's MPS daemon for replicas that take a fraction of a GPU, where none runs yet."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from scepsy.deployment.machine import mps_command
from scepsy.deployment.shimmed import Shimmed, StartError
from scepsy.deployment.state import Kept

_READY_S: Final = 20.0
_GRACE_S: Final = 5.0
_AGAIN_S: Final = 1.0


class MpsDaemon:
    """A daemon of the deployment's own, kept by a shim like an engine, and started again when it ends."""

    def __init__(
        self, pipe_directory: str, log: Path, *, on_change: Callable[[], None], on_event: Callable[[str], None]
    ) -> None:
        """`on_change` is called when its processes come or go, `on_event` with what people may want to know."""
        self._pipes = Path(pipe_directory)
        self._log = log
        self._on_change = on_change
        self._on_event = on_event
        self._process: Shimmed | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def kept(self) -> Kept | None:
        """Its processes, for the state file."""
        return self._process.kept if self._process is not None else None

    async def start(self) -> None:
        """Start it, wait until it listens, and keep it up. Raises StartError or ScepsyError; nothing is then left."""
        await self._start()
        self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End it; its clients must have ended."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self._end()

    async def _start(self) -> None:
        # Only this user's engines may become its clients.
        self._pipes.mkdir(mode=0o700, parents=True, exist_ok=True)
        env = {"CUDA_MPS_PIPE_DIRECTORY": str(self._pipes), "CUDA_MPS_LOG_DIRECTORY": str(self._log.parent)}
        self._process = await Shimmed.launch("mps", mps_command(), env, log=self._log, grace_s=_GRACE_S)
        self._on_change()
        deadline = time.monotonic() + _READY_S
        while not (self._pipes / "control").exists():
            if self._process.ended.done() or time.monotonic() > deadline:
                await self._end()
                raise StartError(f"the MPS daemon did not start; see {self._log}")
            await asyncio.sleep(0.05)

    async def _keep(self) -> None:
        """Without it engines that start take all of a GPU; those that ran end by themselves, and are started again."""
        while True:
            if self._process is not None:
                await asyncio.wait([self._process.ended])
                self._on_event("the MPS daemon ended unasked; starting it again")
                await self._end()
            await asyncio.sleep(_AGAIN_S)
            try:
                await self._start()
            except (StartError, OSError) as error:
                self._on_event(str(error))

    async def _end(self) -> None:
        if self._process is not None:
            await self._process.end()
            self._process = None
        shutil.rmtree(self._pipes, ignore_errors=True)

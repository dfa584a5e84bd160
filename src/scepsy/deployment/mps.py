"""NVIDIA's MPS daemon for replicas that take a fraction of a GPU, where none runs yet."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from scepsy.deployment.machine import mps_command
from scepsy.deployment.shimmed import Shimmed, StartError
from scepsy.deployment.state import Kept

_READY_S = 20.0
_GRACE_S = 5.0


class MpsDaemon:
    """A daemon of the deployment's own, kept by a shim like an engine."""

    def __init__(self, pipe_directory: str, log: Path) -> None:
        self._pipes = Path(pipe_directory)
        self._log = log
        self._process: Shimmed | None = None

    @property
    def kept(self) -> Kept | None:
        """Its processes, for the state file."""
        return self._process.kept if self._process is not None else None

    async def start(self) -> None:
        """Start it and wait until it listens. Raises StartError or ScepsyError."""
        self._pipes.mkdir(parents=True, exist_ok=True)
        env = {"CUDA_MPS_PIPE_DIRECTORY": str(self._pipes), "CUDA_MPS_LOG_DIRECTORY": str(self._log.parent)}
        self._process = await Shimmed.launch("mps", mps_command(), env, log=self._log, grace_s=_GRACE_S)
        deadline = time.monotonic() + _READY_S
        while not (self._pipes / "control").exists():
            if self._process.ended.done() or time.monotonic() > deadline:
                await self.stop()
                raise StartError(f"the MPS daemon did not start; see {self._log}")
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End it; its clients must have ended."""
        if self._process is not None:
            await self._process.end()
            self._process = None
        shutil.rmtree(self._pipes, ignore_errors=True)

"""A command under a shim of its own, as the controller holds it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from scepsy.deployment import processes
from scepsy.deployment.state import Kept, end_kept

START_MARK: Final = "--- "
"""How the line begins that opens each start in a log."""
_SHIM: Final = Path(__file__).with_name("shim.py")


class StartError(Exception):
    """Something ended, or was given up, before it was ready. The message is complete."""


class Shimmed:
    """A running shim. Made by `launch`, ended by `end`."""

    def __init__(self, shim: asyncio.subprocess.Process, kept: Kept, grace_s: float) -> None:
        self.kept = kept
        self.ended = asyncio.ensure_future(shim.wait())
        """The exit code of the command, once all of its tree is gone."""
        self._shim = shim
        self._grace_s = grace_s

    @classmethod
    async def launch(
        cls,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        log: Path,
        grace_s: float,
        pass_fds: Collection[int] = (),
    ) -> Shimmed:
        """Start the command; `env` is added to this process's environment, output is added to `log`.

        It inherits `pass_fds` under the same numbers. Raises StartError where that is impossible.
        """
        # A log that cannot be written, as on a full disk, is no reason not to serve.
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as output:
            output.write(f"{START_MARK}{time.strftime('%F %T')} {' '.join(argv)}\n")
        try:
            # Short, because vLLM puts sockets there, whose paths may not exceed 107 bytes.
            scratch = tempfile.mkdtemp(prefix="scepsy-")
        except OSError as error:
            raise StartError(f"{name}: no folder for its temporary files can be made: {error}") from error
        environment = os.environ | {"TMPDIR": scratch, "VLLM_RPC_BASE_PATH": scratch} | dict(env)
        try:
            shim = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_SHIM), str(grace_s), str(log), scratch),
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
                start_new_session=True,
                pass_fds=pass_fds,
            )
            identity = processes.identify(shim.pid)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise StartError(f"{name}: no process can be started for it: {error}") from error
        assert shim.stdout is not None  # noqa: S101 - it was started with a pipe
        line = await shim.stdout.readline()
        try:
            engine = processes.identify(int(line)) if line else None
        except ProcessLookupError:
            engine = None
        return cls(shim, Kept(id=name, shim=identity, engine=engine, scratch=scratch), grace_s)

    @property
    def pid(self) -> int:
        """Of the shim: the root of the tree."""
        return self.kept.shim.pid

    async def end(self) -> None:
        """End the command and everything that it started, and what a killed shim may have left."""
        if not self.ended.done():
            self._shim.send_signal(signal.SIGTERM)
            await asyncio.wait([self.ended], timeout=self._grace_s + 10)
        if not self.ended.done():
            self._shim.kill()
            await asyncio.wait([self.ended])
        await asyncio.to_thread(end_kept, self.kept)


def exit_text(code: int) -> str:
    """An exit code in words."""
    try:
        name = signal.Signals(code - 128).name if code > 128 else ""
    except ValueError:
        name = ""
    if not name:
        return f"exit code {code}"
    return f"killed by {name}" + (", as the kernel does when memory runs out" if name == "SIGKILL" else "")

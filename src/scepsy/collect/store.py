"""Trace files that many writers share: whole lines, one file after another by size, nothing acknowledged and lost."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import Final

from scepsy.capture.trace_file import append_whole
from scepsy_optimizer.errors import ScepsyError

FILE_BYTES: Final = 256 << 20
WAITING_BYTES: Final = 64 << 20


class FullError(Exception):
    """More is waiting to be written than may wait: try again later."""


class TraceStore:
    """Appends lines to files in a directory. Writing happens in a thread; `write` returns when it is done.

    A file is followed by the next once it holds `file_bytes`; at most `waiting_bytes` wait to be written.
    """

    def __init__(self, directory: Path, *, file_bytes: int = FILE_BYTES, waiting_bytes: int = WAITING_BYTES) -> None:
        """Raises ScepsyError if the directory cannot be made or written."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ScepsyError(f"{directory}: traces cannot be written here: {error.strerror}") from error
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ScepsyError(f"{directory}: traces cannot be written here: permission denied")
        self.directory = directory
        self.files = 0
        self._stem = f"collected-{socket.gethostname()}-{os.getpid()}-{time.time_ns() // 1_000_000}"
        self._file_bytes = file_bytes
        self._waiting_bytes = waiting_bytes
        self._held = 0
        self._queue: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._descriptor: int | None = None
        self._size = 0

    async def write(self, line: bytes) -> None:
        """Append a line, which ends with a newline. Raises FullError, or OSError if it cannot be written."""
        if self._held and self._held + len(line) > self._waiting_bytes:
            raise FullError
        self._held += len(line)
        done = asyncio.get_running_loop().create_future()
        self._queue.append((line, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_waiting())
        # Who gives up waiting does not take the line back.
        await asyncio.shield(done)

    async def close(self) -> None:
        """Write what waits and close the file."""
        if self._writing is not None:
            await self._writing
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    async def _write_waiting(self) -> None:
        while self._queue:
            batch = list(self._queue)
            self._queue.clear()
            errors = await asyncio.to_thread(self._append, [line for line, _ in batch])
            for (line, done), error in zip(batch, errors, strict=True):
                self._held -= len(line)
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)
        self._writing = None

    def _append(self, lines: list[bytes]) -> list[OSError | None]:
        errors: list[OSError | None] = []
        for line in lines:
            try:
                append_whole(self._file_for(line), line)
                self._size += len(line)
                errors.append(None)
            except OSError as error:
                errors.append(error)
        return errors

    def _file_for(self, line: bytes) -> int:
        if self._descriptor is not None and self._size + len(line) > self._file_bytes:
            os.close(self._descriptor)
            self._descriptor = None
        if self._descriptor is None:
            path = self.directory / f"{self._stem}-{self.files:04d}.jsonl"
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self.files += 1
            self._size = 0
        return self._descriptor

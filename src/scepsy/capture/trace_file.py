"""Spans as OTLP/JSON lines: what the OpenTelemetry Collector's file exporter writes.

One file per process, appended to by single writes of whole lines, so a process that is killed loses only the spans that
had not ended, or had ended within the last half second.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from scepsy.capture.handle import Handle, Outcome
from scepsy.capture.otlp_json import encode_request
from scepsy.capture.recorder import recorder
from scepsy.capture.safety import harmless, logger, tell
from scepsy_optimizer.errors import ScepsyError

FLUSH_INTERVAL_S: Final = 0.5
_LIMIT: Final = 200_000
"""Spans waiting to be written, beyond which new ones are dropped and counted."""


class TraceFile(SpanProcessor):
    """Writes every span that ends to a file of this process in `directory`.

    Of spans that Scepsy did not make only the skeleton is written (name, ids, times): they may hold prompts.

    Raises ScepsyError if the directory cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ScepsyError(f"{directory}: traces cannot be written here: {error.strerror}") from error
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ScepsyError(f"{directory}: traces cannot be written here: permission denied")
        self._resource = Resource.create()  # not when it is first needed: that may be at exit, when no thread starts
        self._begin()
        _files.add(self)
        _flush_when_children_exit()

    def _begin(self) -> None:
        """A new file, queue and thread: for a new process as well as for a new TraceFile."""
        self._waiting: deque[ReadableSpan | Handle] = deque()
        self._dropped = 0
        self._write_lock = threading.Lock()
        # Not an event: that holds a lock while it makes another, and what the garbage collector closes then ends spans.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_woken = False
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.Lock()
        self._pid = os.getpid()
        self._descriptor: int | None = None
        host = socket.gethostname()
        started_ms = time.time_ns() // 1_000_000
        self.path = self.directory / f"spans-{host}-{self._pid}-{started_ms}.jsonl"
        self._process: dict[str, str | int] = {"host.name": host, "process.pid": self._pid}

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing is written of a span before its end."""

    def on_end(self, span: ReadableSpan | Handle) -> None:
        """Queue a span, or a handle that has ended."""
        if self._stopped:
            return
        if len(self._waiting) >= _LIMIT:
            self._dropped += 1
            return
        self._waiting.append(span)
        if _exiting.is_set():
            self.force_flush()
        elif not self._is_woken:
            self._is_woken = True
            self._wake.put(None)
            if self._thread is None or not self._thread.is_alive():
                self._start_thread()

    def _start_thread(self) -> None:
        with self._thread_lock:
            if (self._thread is None or not self._thread.is_alive()) and not self._stopped:
                self._thread = threading.Thread(target=self._work, name="scepsy-trace-file", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while not self._stopped:
            self._wake.get()
            if not self._stopped:
                time.sleep(FLUSH_INTERVAL_S)
            self._is_woken = False
            self.force_flush()

    def force_flush(self, timeout_millis: int = 30000) -> bool:  # noqa: ARG002 - the processor interface has it
        """Write all that is queued. False if it could not be written; it is dropped then, with one line in the log."""
        with self._write_lock:
            spans = []
            while self._waiting:
                spans.append(self._waiting.popleft())
            if self._dropped:
                logger.warning("%d spans were dropped: more than %d were waiting to be written", self._dropped, _LIMIT)
                self._dropped = 0
            if not spans:
                return True
            try:
                line = encode_request(spans, self._process, self._resource)
                if self._descriptor is None:
                    self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                append_whole(self._descriptor, line)
            except Exception as error:  # noqa: BLE001 - the thread that writes must live on, whatever it was
                tell(f"writing spans to {self.path}", error)
                return False
            return True

    def shutdown(self) -> None:
        """Write what is queued and close the file."""
        self._stopped = True
        self._wake.put(None)
        self.force_flush()
        with self._write_lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
        _files.discard(self)

    def after_fork(self) -> None:
        """In a forked child: what is queued and the open file belong to the parent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._begin()


_files: Final[weakref.WeakSet[TraceFile]] = weakref.WeakSet()


def flush_all() -> None:
    """Write what every trace file of this process has queued."""
    for file in list(_files):
        file.force_flush()


def _after_fork_in_child() -> None:
    for file in list(_files):
        file.after_fork()
    _flush_when_children_exit()


def _flush_when_children_exit() -> None:
    # Children of multiprocessing leave through os._exit and run no atexit functions, only these.
    finalizers = sys.modules.get("multiprocessing.util")
    if finalizers is not None:
        finalizers.register_after_fork(flush_all, _flush_at_exit_of_child)


def _flush_at_exit_of_child(flush: Any) -> None:
    from multiprocessing.util import Finalize

    Finalize(None, flush, exitpriority=0)


_exiting: Final = threading.Event()
"""This process is about to end: what ends now is written at once."""


def _at_exit() -> None:
    _exiting.set()
    for handle in reversed(list(recorder.open.values())):
        handle.end(outcome=Outcome.ABANDONED)
    flush_all()


atexit.register(harmless(_at_exit))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def append_whole(descriptor: int, line: bytes) -> None:
    """Write a line to a file that is open for appending, whole or not at all. Raises OSError."""
    start = os.fstat(descriptor).st_size
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        # Of a line that does not fit nothing stays, so that the next one begins a line.
        os.ftruncate(descriptor, start)
        raise

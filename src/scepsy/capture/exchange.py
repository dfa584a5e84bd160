"""The HTTP side of an LLM call: attempts, back-off, the stream, and what the server says of it.

Where a framework has already opened an LLM call for this request, the exchange becomes part of it: one call, one span,
with the interval of the request, not of the framework's wrapping. Otherwise the exchange opens the call itself.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from scepsy import semconv
from scepsy.capture.handle import Attribute, Handle, Outcome, how_ended, now_ns
from scepsy.capture.recorder import Recorder

_claiming = threading.RLock()


def _after_fork_in_child() -> None:
    global _claiming
    _claiming = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Exchange:
    """One request to a server that speaks OpenAI's API, with all attempts that its client makes."""

    __slots__ = (
        "attempt_ns", "attempts", "backoff_ns", "chunks", "end_ns", "failed", "first_ns", "handle", "hides_usage",
        "last_ns", "owned", "start_ns", "streamed", "wait_ns", "wasted_ns",
    )  # fmt: skip

    def __init__(self, handle: Handle, *, owned: bool) -> None:
        self.handle = handle
        self.owned = owned
        self.start_ns = now_ns()
        self.attempts = 0
        self.attempt_ns = self.start_ns
        self.backoff_ns: int | None = None
        self.wasted_ns = 0
        self.wait_ns = 0
        self.first_ns: int | None = None
        self.last_ns: int | None = None
        self.end_ns: int | None = None
        self.chunks = 0
        self.streamed = False
        self.failed = False
        self.hides_usage = False
        """Whether the usage in a stream was asked for on the program's behalf, which does not expect it."""

    @classmethod
    def begin(
        cls,
        recorder: Recorder,
        operation: str,
        *,
        model: str,
        provider: str = "",
        address: str = "",
        port: int | None = None,
        streamed: bool = False,
    ) -> Exchange:
        """The request is about to be sent."""
        around, outer = recorder.around()
        if around is not None and around.kind == semconv.KIND_LLM:
            earlier = around.exchange
            claim = cls(around, owned=False)
            # Of two requests in threads below one call the first is the call's.
            with _claiming:
                is_first = around.accepting
                if is_first:
                    around.exchange = claim
            if is_first:
                exchange = claim
                around.restart(f"{operation} {model}".rstrip(), exchange.start_ns)
            elif isinstance(earlier, cls) and earlier.failed and around.first_ns is None:
                exchange = earlier
                exchange.resume()
            else:
                exchange = cls._own(recorder, around.parent, around.outer, operation, model)
        else:
            exchange = cls._own(recorder, around, outer, operation, model)
        exchange.streamed = streamed
        exchange.attempts += 1
        handle = exchange.handle
        attributes = handle.attributes
        attributes[semconv.OPERATION] = operation
        if model:
            attributes[semconv.REQUEST_MODEL] = model
        if provider and semconv.PROVIDER not in attributes:
            attributes[semconv.PROVIDER] = provider
        if address:
            attributes[semconv.SERVER_ADDRESS] = address
        if port is not None:
            attributes[semconv.SERVER_PORT] = port
        if streamed:
            attributes[semconv.REQUEST_STREAM] = True
        return exchange

    @classmethod
    def _own(cls, recorder: Recorder, parent: Handle | None, outer: Any, operation: str, model: str) -> Exchange:
        handle = recorder.start_below(parent, outer, semconv.KIND_LLM, model, operation=operation)
        exchange = cls(handle, owned=True)
        handle.exchange = exchange
        return exchange

    def resume(self) -> None:
        """The framework sends again what has failed: time since the failure was waiting."""
        now = now_ns()
        if self.end_ns is not None:
            self.wait_ns += now - self.end_ns
        self.failed = False
        self.end_ns = None
        self.attempt_ns = now

    def attempt(self) -> None:
        """The client sends the request again."""
        now = now_ns()
        self.attempts += 1
        if self.backoff_ns is not None:
            self.wait_ns += now - self.backoff_ns
            self.backoff_ns = None
        self.attempt_ns = now

    def backoff(self) -> None:
        """The attempt has failed and the client waits before the next."""
        self.backoff_ns = now_ns()
        self.wasted_ns += self.backoff_ns - self.attempt_ns

    def arrived(self) -> None:
        """The answer is here, as far as it is not a stream: what follows is the client's own parsing."""
        self.last_ns = now_ns()

    def received(self, *, answer: bool = True, generated: bool = False) -> None:
        """A piece has come: perhaps part of the `answer`, perhaps with something newly `generated` in it."""
        now = now_ns()
        self.last_ns = now
        if answer and self.first_ns is None:
            self.first_ns = now
        if generated:
            self.chunks += 1

    def succeed(self) -> None:
        """The answer is complete."""
        if self.end_ns is None:
            self._close(self.last_ns)

    def abandon(self) -> None:
        """Nobody read the answer to its end."""
        if self.end_ns is None:
            self._close(self.last_ns, outcome=Outcome.ABANDONED)

    def fail(self, error: BaseException) -> None:
        """The last attempt has failed, or was cancelled."""
        if self.end_ns is not None:
            return
        outcome = how_ended(error)
        if outcome is not None:
            self._close(self.last_ns if outcome is Outcome.ABANDONED else None, error=error, outcome=outcome)
            return
        self.failed = True
        if self.backoff_ns is None:
            self.wasted_ns += now_ns() - self.attempt_ns
        self._close(None, error=error)

    def _close(self, end_ns: int | None, *, error: BaseException | None = None, outcome: Outcome | None = None) -> None:
        self.end_ns = now_ns() if end_ns is None else end_ns
        handle = self.handle
        if not handle.live:
            return
        self.describe()
        # A framework's own call goes on after a failure: it may send again. A cancelled one may never tell of its end.
        if self.owned or outcome is not None:
            handle.end(error=error, outcome=outcome, end_ns=self.end_ns)

    def describe(self) -> None:
        """Note what the attempts and the stream have told."""
        attributes = self.handle.attributes
        attributes[semconv.ATTEMPTS] = max(self.attempts, 1)
        if self.wasted_ns:
            attributes[semconv.WASTED_S] = self.wasted_ns / 1e9
        if self.wait_ns:
            attributes[semconv.RETRY_WAIT_S] = self.wait_ns / 1e9
        if self.first_ns is not None:
            attributes[semconv.TIME_TO_FIRST_CHUNK_S] = (self.first_ns - self.attempt_ns) / 1e9
        if self.streamed and self.chunks:
            attributes[semconv.OUTPUT_CHUNKS] = self.chunks

    def note(self, key: str, value: Attribute | None) -> None:
        """Record what the server said, unless it said nothing."""
        if value is not None and self.handle.live:
            self.handle.attributes[key] = value


def end_call(handle: Handle, error: BaseException | None = None) -> None:
    """A framework tells that its LLM call is over.

    Where the call went over HTTP within sight, the exchange decides when it ended and whether it failed: what the
    framework does with a complete answer is not the engine's time.
    """
    outcome = how_ended(error)
    exchange = handle.exchange
    if not isinstance(exchange, Exchange):
        handle.end(
            error=error, outcome=outcome, end_ns=None if error is not None and outcome is None else handle.last_ns
        )
        return
    complete = exchange.end_ns is not None and not exchange.failed
    exchange.describe()
    end_ns = exchange.last_ns if exchange.end_ns is None else exchange.end_ns
    handle.end(error=None if complete and outcome is None else error, outcome=outcome, end_ns=end_ns)

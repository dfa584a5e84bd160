"""`instrument()`: turn capture on, and say where its spans go."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from opentelemetry import trace
from opentelemetry.trace import TracerProvider

from scepsy.capture.context import patch_threads, restore_threads
from scepsy.capture.recorder import recorder
from scepsy.capture.safety import tell
from scepsy.capture.settings import Redact, settings
from scepsy_optimizer.errors import ScepsyError

TRACES_VARIABLE: Final = "SCEPSY_TRACES"
DEFAULT_DIRECTORY: Final = "scepsy-traces"
_GROUP: Final = "opentelemetry_instrumentor"
_PREFIX: Final = "scepsy-"


class Instrumentor(Protocol):
    """A framework's hook, as its entry point names it: OpenTelemetry's own protocol, without its base class."""

    def instrument(self, **kwargs: Any) -> None:
        """Turn the hook on; does nothing if the framework is not installed or the hook is on."""

    def uninstrument(self, **kwargs: Any) -> None:
        """Turn it off and restore everything."""


@dataclass(slots=True)
class _State:
    """What has been turned on in this process."""

    destination_chosen: bool = False
    threads: bool = False
    trace_file: Any = None
    instrumentors: list[Instrumentor] = field(default_factory=list)
    destination: tuple[Path | None, object] = (None, None)
    undo_clients: WeakKeyDictionary[object, Callable[[], None]] = field(default_factory=WeakKeyDictionary)


_state = _State()
_turning: Final = threading.RLock()


def instrument(
    client: object | None = None,
    *,
    directory: str | os.PathLike[str] | None = None,
    provider: TracerProvider | None = None,
    threads: bool = False,
    record_content: bool | None = None,
    redact: Redact | None = None,
    include_usage: bool | None = None,
) -> None:
    """Capture every LLM call of this process, or of one client object.

    Turns on the hooks of all supported frameworks that are installed; with a `client` (such as `openai.OpenAI()`) only
    that client's. Calling it again changes nothing but what is said anew.

    Spans go to `provider`; without one, to the provider that the application has set for OpenTelemetry, which is never
    replaced; without that, to files in `directory`, in $SCEPSY_TRACES, or in ./scepsy-traces. A `directory` that is
    given gets the files in any case. `threads=True` also carries the current workflow into every new thread and thread
    pool of the process.

    Prompts and answers are recorded only with `record_content=True`, or where
    $OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT is true. Each of their texts then first goes to `redact`, in the
    process and at the time of the call; what it returns is recorded, None for nothing. If it raises, the content is
    dropped, never the call. `include_usage=True`, or $SCEPSY_INCLUDE_USAGE, asks OpenAI-compatible servers for the
    token counts of streams where the program itself does not, and keeps the additional piece from the program.

    Raises ScepsyError if the directory cannot be written or the client is of no supported kind.
    """
    with _turning:
        if directory is not None or provider is not None or not _state.destination_chosen:
            _choose_destination(None if directory is None else Path(directory), provider)
        if record_content is not None:
            settings.record_content = record_content
        if redact is not None:
            settings.redact = redact
        if include_usage is not None:
            settings.include_usage = include_usage
        if threads and not _state.threads:
            patch_threads()
            _state.threads = True
        if client is not None:
            _instrument_client(client)
            return
        if _state.instrumentors:
            return
        for point in _hooks():
            try:
                hook: Instrumentor = point.load()()
                hook.instrument()
            except Exception as error:  # noqa: BLE001 - a framework that cannot be hooked must not stop the program
                tell(f"the hook {point.name}", error)
            else:
                _state.instrumentors.append(hook)


def uninstrument() -> None:
    """Turn every hook off, restore what they changed, and write the spans that wait."""
    with _turning:
        for hook in _state.instrumentors:
            try:
                hook.uninstrument()
            except Exception as error:  # noqa: BLE001 - the others are still to be undone
                tell(f"undoing {type(hook).__module__}", error)
        for undo in list(_state.undo_clients.values()):
            undo()
        _state.instrumentors.clear()
        _state.undo_clients.clear()
        if _state.threads:
            restore_threads()
            _state.threads = False
        settings.reset()
        _leave_destination()


def flush() -> None:
    """Write now what has ended, rather than within half a second."""
    if _state.trace_file is not None:
        _state.trace_file.force_flush()


def _hooks() -> list[EntryPoint]:
    found = {point.name: point for point in entry_points(group=_GROUP) if point.name.startswith(_PREFIX)}
    return [found[name] for name in sorted(found)]


def _instrument_client(client: object) -> None:
    for point in _hooks():
        wrap = getattr(point.load(), "instrument_client", None)
        undo = None if wrap is None else wrap(client)
        if undo is not None:
            _state.undo_clients.setdefault(client, undo)
            return
    kind = f"{type(client).__module__}.{type(client).__qualname__}"
    raise ScepsyError(f"{kind} is not a client that Scepsy can instrument; pass an openai.OpenAI or openai.AsyncOpenAI")


def _choose_destination(directory: Path | None, provider: TracerProvider | None) -> None:
    recorder.adopt_environment()
    known: Any = provider or _provider_of_application()
    destination = (None if directory is None else directory.absolute(), known)
    if _state.destination_chosen and destination == _state.destination:
        return
    before, file = _state.trace_file, None
    if known is None or directory is not None:
        from scepsy.capture.pools import flush_at_exit_of_workers
        from scepsy.capture.trace_file import TraceFile

        file = TraceFile(directory or Path(os.environ.get(TRACES_VARIABLE) or DEFAULT_DIRECTORY))
        flush_at_exit_of_workers()
        if known is not None:
            known.add_span_processor(file)
    # The new place is there before the old one goes: what ends meanwhile is not lost.
    if known is not None:
        recorder.use(known)
    elif file is not None:
        recorder.use(sink=file.on_end)
    _state.trace_file, _state.destination, _state.destination_chosen = file, destination, True
    _close(before)


def _provider_of_application() -> TracerProvider | None:
    """The provider that the application has set, if it is one that records."""
    known = trace.get_tracer_provider()
    return known if hasattr(known, "add_span_processor") else None


def _leave_destination() -> None:
    before, _state.trace_file = _state.trace_file, None
    _state.destination_chosen = False
    recorder.use()
    _close(before)


def _close(file: Any) -> None:
    """Write what waits for a file that is used no more."""
    if file is None:
        return
    file.shutdown()
    if _state.trace_file is None:
        from scepsy.capture.pools import restore_workers

        restore_workers()

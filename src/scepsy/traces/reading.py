"""Trace files to executions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from scepsy.traces.assemble import assemble
from scepsy.traces.copies import find_copies
from scepsy.traces.dialects import normalise
from scepsy.traces.matching import attached, match
from scepsy.traces.records import ENGINE_START, FAILED, LLM, NoTracesError, SpanRecord, Tally
from scepsy.traces.sources import find_files, read_spans
from scepsy.traces.spool import Spool
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Execution

NO_TRACES: Final = "files in a directory that hold no traces"
STARTING: Final = "spans of an engine's own start"

# A batch may be a whole table, which need not be in memory at once.
_AT_ONCE = 1024

# There are millions of spans, and most loops over them can be left to these.
_detached, _kind = attrgetter("detached"), attrgetter("kind")
_names = attrgetter("model", "endpoint", "scope", "status")


class NoExecutionError(ScepsyError):
    """There are traces, and none of them is a whole execution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was read: executions in the order of their start, and an account of the rest.

    `dropped` counts what was left out and `repaired` what was kept but mended, each by its reason. `files` and `spans`
    count what was looked at.
    """

    executions: tuple[Execution, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    repaired: Mapping[str, int] = field(default_factory=dict)
    files: int = 0
    spans: int = 0


def read_executions(paths: Sequence[str | Path]) -> Reading:
    """Read trace files, and directories of them, to executions: one for each trace. "-" is standard input.

    Formats: OTLP as JSON lines or protobuf; exports of Langfuse, Phoenix and Jaeger; tables of calls as CSV or Parquet;
    each also under gzip or zstd. An LLM goes by its model's name, or by `model@host:port` where one model name is
    served at several endpoints. Raises ScepsyError for a path that cannot be read, for a file without any trace, and
    if no execution is whole.
    """
    tally = Tally()
    found = sorted(iter_executions(paths, tally), key=lambda execution: (execution.started_ns, execution.id))
    return Reading(
        executions=tuple(found),
        dropped=dict(tally.dropped),
        repaired=dict(tally.repaired),
        files=tally.files,
        spans=tally.spans,
    )


def iter_executions(
    paths: Sequence[str | Path], tally: Tally, *, on_progress: Callable[[float], None] | None = None
) -> Iterator[Execution]:
    """The executions of any number of files in bounded memory, in no particular order; `tally` is complete at the end.

    Files are read to their end before the first execution comes. `on_progress` gets the part of the way that is behind,
    in bytes read, then in spans assembled, together from 0 to 1; standard input has no known end and counts nothing.
    Raises what `read_executions` raises.
    """
    names = LLMNames()
    with Spool() as spool:
        detached: list[SpanRecord] = []
        files = find_files(paths)
        way = _Way(on_progress, files)
        for path, named in files.items():
            try:
                for batch in read_spans(path, tally, way.read):
                    raws = iter(batch)
                    # Spans are not to be kept while the next ones are read.
                    del batch
                    while records := [normalise(raw) for raw in islice(raws, _AT_ONCE)]:
                        names.saw(records)
                        if True in map(_detached, records) or ENGINE_START in map(_kind, records):
                            detached += filter(_detached, records)
                            spool.add([r for r in records if not r.detached and r.kind != ENGINE_START])
                            tally.drop(STARTING, sum(record.kind == ENGINE_START for record in records))
                        else:
                            spool.add(records)
            except NoTracesError:
                if named:
                    raise
                tally.dropped[NO_TRACES] += 1
            way.next_file(path)
        moved = _reunite(detached, spool)
        copies = find_copies(_staying(spool, moved)) if names.scopes > 1 else {}
        whole = False
        for trace, records in spool.traces():
            way.assembled(len(records), tally.spans)
            if trace in moved:
                continue
            execution = assemble(
                trace, records, name_llm=names.name, tally=tally, copies=copies.get(trace, frozenset())
            )
            if execution is not None:
                whole = True
                yield execution
    if not whole:
        where = ", ".join(map(str, paths))
        raise NoExecutionError(
            f"{where}: no whole execution in {tally.files} file(s): {_describe(tally)}; {_advice(tally)}"
        )


def _reunite(detached: Sequence[SpanRecord], spool: Spool) -> Collection[str]:
    """Put detached requests below their calls, with all that is below them, or back where they came from.

    Returns the traces that have moved to another one.
    """
    if not detached:
        return ()
    calls = match(detached, (record for record in spool.records() if record.kind == LLM))
    moved: dict[str, SpanRecord] = {}

    def home(trace: str) -> str:
        """The trace in which one that may have moved now lies."""
        while trace in moved:
            trace = moved[trace].trace
        return trace

    left = []
    requests = []
    for record in detached:
        call = calls.get((record.trace, record.id))
        # Two traces may each hold a call that fits the other's request: only one of them can move.
        if call is None or home(call.trace) == record.trace:
            left.append(record)
        else:
            moved.setdefault(record.trace, call)
            requests.append((record, call))
    spool.add([attached(record, call, home(call.trace)) for record, call in requests])
    if moved:
        left += [record for record in spool.records() if record.trace in moved]
    spool.add(
        replace(record, trace=home(record.trace), parent=record.parent or moved[record.trace].parent)
        if record.trace in moved
        else record
        for record in left
    )
    return moved


def _staying(spool: Spool, moved: Collection[str]) -> Iterator[tuple[str, list[SpanRecord]]]:
    """The traces whose spans have not moved to another one."""
    return ((trace, records) for trace, records in spool.traces() if trace not in moved)


class _Way:
    """How much of a reading is done."""

    # What comes after takes longer than reading lines: executions are put together and looked at.
    _READING = 0.25

    def __init__(self, on_progress: Callable[[float], None] | None, files: Iterable[Path]) -> None:
        self._report = on_progress
        self._bytes = max(1, sum(_size(path) for path in files)) if on_progress is not None else 1
        self._behind = 0
        self._spans = 0

    def read(self, position: int) -> None:
        """So many bytes of the file at hand were read."""
        if self._report is not None:
            self._report(self._READING * min(1.0, (self._behind + position) / self._bytes))

    def next_file(self, path: Path) -> None:
        """A file was read to its end."""
        self._behind += _size(path)

    def assembled(self, spans: int, of: int) -> None:
        """So many more spans went into executions or were left out, of all that there are."""
        self._spans += spans
        if self._report is not None:
            self._report(self._READING + (1 - self._READING) * min(1.0, self._spans / max(1, of)))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class LLMNames:
    """Names LLMs, once all spans were seen: by model, and by endpoint too where one model has several."""

    def __init__(self) -> None:
        self._endpoints: dict[str, set[str]] = {}
        self._scopes: set[str] = set()

    @property
    def scopes(self) -> int:
        """How many libraries have recorded calls."""
        return len(self._scopes)

    def saw(self, records: Sequence[SpanRecord]) -> None:
        """Learn from spans."""
        for model, endpoint, scope, status in set(map(_names, records)):
            # A call that failed says where somebody looked for the model, not where it is.
            if endpoint and status != FAILED:
                self._endpoints.setdefault(model, set()).add(endpoint)
            if scope:
                self._scopes.add(scope)

    def name(self, model: str, endpoint: str) -> str:
        """The name of the LLM that serves `model` at `endpoint` ("host:port", or empty where it is not known)."""
        return f"{model}@{endpoint}" if endpoint and len(self._endpoints.get(model, ())) > 1 else model


def _describe(tally: Tally) -> str:
    """What was found and left out, in words."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common())
    return f"{tally.spans} spans; left out: {reasons}" if reasons else f"{tally.spans} spans"


def _advice(tally: Tally) -> str:
    if tally.spans:
        return "let at least one execution run to its end while it is traced"
    return "call scepsy.instrument() in the agent before it runs, and read the directory it writes"

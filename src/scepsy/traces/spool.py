"""Where records wait until every span of their trace was seen: in memory, or in a file where there are too many.

The spans of an execution may lie anywhere in any of the files, so none can be assembled before the last line was read.
Records are set aside in parts by their trace, and read back part by part, so that only one part is in memory at once.
What is held at a time is small enough for a processor's cache: in and out of memory, records take a tenth longer.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import IO
from zlib import crc32

import msgspec

from scepsy.traces.records import SpanRecord

_PARTS = 512
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[SpanRecord])


class Spool:
    """Records by trace, of which at most `limit` and one batch are held in memory at a time while they are added.

    To be used as a context manager, so that its file goes away.
    """

    def __init__(self, *, limit: int = 2000) -> None:
        self._limit = limit
        self._held: list[SpanRecord] = []
        # Where each chunk of a part begins, and its size.
        self._chunks = [array("Q") for _ in range(_PARTS)]
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, records: Iterable[SpanRecord]) -> None:
        """Set records aside."""
        self._held += records
        if len(self._held) >= self._limit:
            self._write_out()

    def traces(self) -> Iterator[tuple[str, list[SpanRecord]]]:
        """Every trace with its records, in the order in which they were added."""
        held = self._by_part()
        for part in range(_PARTS):
            yield from _by_trace(self._records(part, held)).items()

    def records(self) -> Iterator[SpanRecord]:
        """Every record, in no particular order."""
        held = self._by_part()
        for part in range(_PARTS):
            yield from self._records(part, held)

    def _records(self, part: int, held: list[list[SpanRecord]]) -> list[SpanRecord]:
        found: list[SpanRecord] = []
        places = iter(self._chunks[part])
        for offset, size in zip(places, places, strict=True):
            assert self._file is not None  # noqa: S101 - a chunk was written to it
            self._file.seek(offset)
            found += _decoder.decode(self._file.read(size))
        return found + held[part]

    def _by_part(self) -> list[list[SpanRecord]]:
        """What is in memory, sorted into parts: by a sum of the trace's id, so that the order is always the same."""
        parts: list[list[SpanRecord]] = [[] for _ in range(_PARTS)]
        for trace, records in _by_trace(self._held).items():
            parts[crc32(trace.encode("utf-8", "surrogatepass")) % _PARTS] += records
        return parts

    def _write_out(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="scepsy-spans-")  # noqa: SIM115 - closed with the spool
        offset = self._file.seek(0, 2)
        for part, records in enumerate(self._by_part()):
            if records:
                written = self._file.write(_encoder.encode(records))
                self._chunks[part].extend((offset, written))
                offset += written
        self._held = []


def _by_trace(records: Iterable[SpanRecord]) -> dict[str, list[SpanRecord]]:
    traces: dict[str, list[SpanRecord]] = {}
    last = None
    group: list[SpanRecord] = []
    for record in records:
        trace = record.trace
        # Most spans come after one of their own execution.
        if trace != last:
            group = traces.setdefault(trace, [])
            last = trace
        group.append(record)
    return traces

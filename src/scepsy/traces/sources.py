"""Trace files: which ones, and the spans in each, whatever its format. The content tells the format, not the name."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from scepsy.traces.formats import (
    call_table,
    jaeger_export,
    langfuse_export,
    otlp_json,
    otlp_proto,
    otlp_typed,
    phoenix_export,
)
from scepsy.traces.records import NoTracesError, RawSpan, Tally
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

STDIN = "-"
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".parquet", ".pb", ".binpb", ".otlp")
COMPRESSED = ("", ".gz", ".zst")
_ENDINGS = tuple(suffix + more for suffix in SUFFIXES for more in COMPRESSED)

TORN = "lines cut off at the end of a file"
NOT_JSON = "lines that are not JSON"
NOT_SPANS = "JSON values without spans"
TORN_MESSAGE = "messages cut off at the end of a file"

_NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_PARQUET = b"PAR1"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DELIMITERS = (b",", b";", b"\t")
_HEADER = 4096
# Lines are long: put together from small pieces they take several times as long.
_BUFFER = 1 << 20
_LONGEST_MESSAGE = 1 << 30
# Small, since all that a piece of zstd holds is decompressed at once.
_PACKED = 1 << 14
# So that zipping a file into memory by mistake is an error, not a dead machine.
_LONGEST_DECOMPRESSED = 1 << 31


def is_named_as_traces(path: Path) -> bool:
    """Whether a file is called as traces are: what else lies in a directory of traces is not read."""
    return path.name.endswith(_ENDINGS)


def find_files(paths: Sequence[str | Path]) -> Mapping[Path, bool]:
    """The files among `paths` and the trace files in the directories among them, each once; "-" is standard input.

    The values say which were named themselves: what lies in a directory need not be a trace.

    Raises ScepsyError for a path that does not exist and for a directory without any trace file.
    """
    files: dict[Path, tuple[Path, bool]] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if is_named_as_traces(file) and file.is_file())
            if not found:
                raise ScepsyError(f"{path}: no trace files in this directory; expected *{', *'.join(SUFFIXES)}")
        elif path.exists() or str(path) == STDIN:
            found = [path]
        else:
            raise ScepsyError(f"{path}: no such file or directory; expected traces")
        for file in found:
            key = file.resolve()
            files[key] = files.get(key, (file, False))[0], not path.is_dir() or files.get(key, (file, False))[1]
    return dict(files.values())


def read_spans(path: Path, tally: Tally, on_bytes: Callable[[int], None]) -> Iterator[Iterable[RawSpan]]:
    """The spans of one file, in batches as they come; `tally` counts what cannot be used.

    After each batch `on_bytes` gets how much of the file was read, as far as that can be told.

    Raises ScepsyError for a file that cannot be opened, and NoTracesError for one in which there is no trace at all.
    """
    tally.files += 1
    try:
        if str(path) == STDIN:
            with io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False), _BUFFER) as stream:
                yield from _spans(path, stream, tally)
        else:
            with io.BufferedReader(io.FileIO(path), _BUFFER) as stream:
                for batch in _spans(path, stream, tally):
                    yield batch
                    del batch
                    on_bytes(stream.tell())
    except (OSError, EOFError, zlib.error) as error:
        raise ScepsyError(f"{path}: cannot be read: {error}") from error


def _spans(path: Path, stream: io.BufferedReader[Any], tally: Tally) -> Iterator[Iterable[RawSpan]]:
    start = stream.peek(4)[:4]
    if start[:2] == _GZIP:
        with gzip.open(stream, "rb") as inner:
            yield from _content(path, io.BufferedReader(inner, _BUFFER), tally)
    elif start == _ZSTD:
        zstandard = _zstandard()
        try:
            inner = _ZstdFrames(stream, zstandard.ZstdDecompressor())
            yield from _content(path, io.BufferedReader(inner, _BUFFER), tally)
        except zstandard.ZstdError as error:
            raise ScepsyError(f"{path}: cannot be read: {error}") from error
    else:
        yield from _content(path, stream, tally)


class _ZstdFrames(io.RawIOBase):
    """What frames of zstd hold, one after another. Frames that are cut off are an EOFError, as they are in gzip.

    zstandard's own reader takes the end of the file for the end of a frame.
    """

    def __init__(self, stream: io.BufferedReader[Any], decompressor: Any) -> None:
        self._stream = stream
        self._decompressor = decompressor
        self._frame: Any = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._unpacked:
            packed = self._packed or self._stream.read(_PACKED)
            if not packed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of its last frame was reached")
                return 0
            frame = self._frame or self._decompressor.decompressobj()
            self._unpacked = memoryview(frame.decompress(packed))
            self._frame, self._packed = (None, frame.unused_data) if frame.eof else (frame, b"")
        into = memoryview(buffer)
        size = min(len(into), len(self._unpacked))
        into[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size


def _content(path: Path, stream: io.BufferedReader, tally: Tally) -> Iterator[Iterable[RawSpan]]:
    start = stream.peek(5)[:5]
    if start[:2] in _UTF16:
        # Also in a directory, where other files without traces are passed over: this one is most likely full of them.
        raise ScepsyError(f"{path}: cannot be read: its text is in UTF-16; save it as UTF-8")
    if start[:3] == codecs.BOM_UTF8:
        stream.read(3)
        start = stream.peek(5)[:5]
    if start[:4] == _PARQUET:
        yield from _parquet(path, stream, tally)
    elif start[:1] == b"\x00":
        yield from _messages(path, stream, tally)
    elif start[:1] == b"\n" and start[1:2] not in (b"", b"\n", b"\r", b" ", b"\t", b"{", b"["):
        # A tag of protobuf: field 1, with the length of the first resource's spans.
        yield otlp_proto.spans(stream.read(), tally)
    elif start.lstrip()[:1] not in (b"{", b"[", b"") and any(
        sign in stream.peek(_HEADER).split(b"\n", 1)[0] for sign in _DELIMITERS
    ):
        yield from _csv(path, stream, tally)
    else:
        yield from _json(path, stream, tally)


def _json(path: Path, stream: io.BufferedReader, tally: Tally) -> Iterator[Iterable[RawSpan]]:
    """Values line by line, or one value over many lines."""
    found = lines = 0
    rest: Iterator[bytes] = iter(stream)
    while (line := next(rest, None)) is not None:
        if line.isspace():
            continue
        lines += 1
        if (spans := otlp_typed.spans(line, tally)) is not None:
            found += 1
            yield spans
            # Not to be kept while the next ones are made: memory that is used again at once is in the cache.
            del spans
            continue
        try:
            value = msgspec.json.decode(line)
        except _NOT_JSON:
            value, rest = _over_lines(line, stream) if lines == 1 else (None, rest)
            if value is None:
                tally.dropped[NOT_JSON if line.endswith(b"\n") else TORN] += 1
                continue
        for item in _items(value):
            reader = next((reader for reader in _READERS if reader.recognises(item)), None)
            if reader is None:
                tally.dropped[NOT_SPANS] += 1
            else:
                found += 1
                yield reader.spans(item, tally)
    if not found:
        was = "nothing: it is empty" if not lines else f"{lines} lines, none of them a complete one"
        raise NoTracesError(
            f"{path}: expected traces (OTLP, or an export of Langfuse, Phoenix or Jaeger), found {was}; "
            "trace the workflow again with scepsy.instrument() or name another file"
        )


_READERS = (otlp_json, jaeger_export, langfuse_export, phoenix_export)


def _over_lines(first: bytes, stream: io.BufferedReader) -> tuple[Any, Iterator[bytes]]:
    """The file as one JSON value, if its first line opens one that goes on over others, else None; and what is left."""
    if not first.rstrip().endswith((b",", b"{", b"[")):
        return None, iter(stream)
    following = stream.read()
    try:
        return msgspec.json.decode(first + following), iter(())
    except _NOT_JSON:
        return None, iter(io.BytesIO(following))


def _items(value: Any) -> Iterator[Any]:
    """The values that are traces or spans: the value itself, or those of a list, bare or under "data"."""
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, list):
        for item in value:
            if isinstance(item, list):
                yield from item
            else:
                yield item
    else:
        yield value


def _messages(path: Path, stream: io.BufferedReader, tally: Tally) -> Iterator[Iterable[RawSpan]]:
    """Messages with their length before them, each JSON or protobuf, each possibly compressed by itself."""
    while prefix := stream.read(4):
        size = int.from_bytes(prefix)
        message = stream.read(size) if size <= _LONGEST_MESSAGE else b""
        if len(prefix) < 4 or len(message) < size:
            tally.dropped[TORN_MESSAGE] += 1
            return
        if message[:4] == _ZSTD:
            zstandard = _zstandard()
            try:
                message = zstandard.ZstdDecompressor().decompress(message, max_output_size=_LONGEST_DECOMPRESSED)
            except zstandard.ZstdError:
                tally.dropped[otlp_proto.NOT_REQUESTS] += 1
                continue
        if message[:1] == b"{":
            yield from _json(path, io.BufferedReader(io.BytesIO(message)), tally)
        else:
            yield otlp_proto.spans(message, tally)


def _csv(path: Path, stream: io.BufferedReader, tally: Tally) -> Iterator[Iterable[RawSpan]]:
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
    header = text.readline()
    delimiter = max(",;\t", key=header.count)
    columns = next(csv.reader([header], delimiter=delimiter), [])
    try:
        rows = csv.DictReader(text, fieldnames=columns, delimiter=delimiter)
        yield from _rows(path, rows, columns, tally)
    except csv.Error as error:
        raise ScepsyError(f"{path}: not a readable CSV table: {error}") from error
    finally:
        text.detach()


def _parquet(path: Path, stream: io.BufferedReader, tally: Tally) -> Iterator[Iterable[RawSpan]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped] # ships no types
    except ImportError as error:
        raise ScepsyError(
            f"{path}: reading Parquet needs pyarrow; install it with: pip install 'scepsy[traces]'"
        ) from error
    try:
        table = parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
        rows = (row for batch in table.iter_batches(batch_size=4096) for row in batch.to_pylist())
        yield from _rows(path, rows, table.schema_arrow.names, tally)
    except ArrowException as error:
        raise ScepsyError(f"{path}: not a readable Parquet file: {error}") from error


def _rows(
    path: Path, rows: Iterator[Mapping[str, Any]], columns: Sequence[str], tally: Tally
) -> Iterator[Iterable[RawSpan]]:
    if phoenix_export.recognises(dict.fromkeys(columns)):
        for row in rows:
            yield phoenix_export.spans(row, tally)
    else:
        workflow = path.name.split(".")[0]
        yield call_table.spans(rows, columns, workflow=workflow, place=str(path), tally=tally)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ScepsyError("reading zstd needs a decoder; install it with: pip install 'scepsy[traces]'") from error
    return zstandard

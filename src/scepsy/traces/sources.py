"""Trace files: which ones, and the spans in each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from scepsy.traces import otlp_json
from scepsy.traces.records import RawSpan, Tally
from scepsy_optimizer.errors import ScepsyError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")

TORN = "lines cut off at the end of a file"
NOT_JSON = "lines that are not JSON"
NOT_SPANS = "lines without spans"


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files among `paths` and the trace files in the directories among them, each once.

    Raises ScepsyError for a path that does not exist and for a directory without any trace file.
    """
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
            if not found:
                raise ScepsyError(f"{path}: no trace files in this directory; expected {', '.join(SUFFIXES)}")
        elif path.exists():
            found = [path]
        else:
            raise ScepsyError(f"{path}: no such file or directory; expected traces")
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def read_spans(path: Path, tally: Tally) -> Iterator[RawSpan]:
    """The spans of one file; `tally` counts what cannot be used.

    Raises ScepsyError for a file that cannot be opened, and for one in which not a single line is a trace.
    """
    tally.files += 1
    try:
        with _open(path) as stream:
            yield from _lines(path, stream, tally)
    except (OSError, EOFError) as error:
        raise ScepsyError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path, stream: BufferedIOBase, tally: Tally) -> Iterator[RawSpan]:
    valid = lines = 0
    for line in stream:
        if not line.strip():
            continue
        lines += 1
        request: Any = None
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            tally.dropped[NOT_JSON if line.endswith(b"\n") else TORN] += 1
            continue
        if otlp_json.is_request(request):
            valid += 1
            yield from otlp_json.spans(request, tally)
        else:
            tally.dropped[NOT_SPANS] += 1
    if not valid:
        found = f"{lines} lines, none of them a complete OTLP/JSON trace request" if lines else "nothing: it is empty"
        raise ScepsyError(
            f"{path}: expected OTLP/JSON lines as scepsy.instrument() and the OpenTelemetry Collector write them, "
            f"found {found}; trace the workflow again or name another file"
        )

"""Finished measurements as lines of a file, so that a crash in the middle costs one point and not all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scepsy_optimizer.errors import ScepsyError


class Journal:
    """Measured points by key, kept in a JSON Lines file if one is given.

    The first line says what was measured (engine, model, flags); a file of something else is refused rather than mixed
    in. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path | None, subject: Mapping[str, Any]) -> None:
        """Raises ScepsyError for a file that cannot be used."""
        self._path = path
        self._points: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        lines = self._read(path)
        if lines and lines[0] != subject:
            raise ScepsyError(
                f"{path}: holds measurements of {_short(lines[0])}, not of {_short(subject)}; "
                "remove it or name another file"
            )
        self._points = {line["key"]: line["point"] for line in lines[1:]}
        # Rewritten, so that what follows does not continue a line that was cut off.
        text = "".join(json.dumps(line) + "\n" for line in (lines or [dict(subject)]))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ScepsyError(f"{path}: cannot be written: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._points)

    def get(self, key: str) -> dict[str, Any] | None:
        """The point of that key, if it was measured."""
        return self._points.get(key)

    def put(self, key: str, point: dict[str, Any]) -> None:
        """Keep a point; on disk when this returns."""
        self._points[key] = point
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "point": point}) + "\n")

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        found: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise ScepsyError(f"{path} line {number}: not valid JSON: {error}") from error
        return found


def _short(subject: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in subject.items())

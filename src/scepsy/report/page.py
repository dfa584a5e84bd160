"""The report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from scepsy.report.summary import warnings
from scepsy_optimizer.errors import ScepsyError


def render_page(summary: Mapping[str, Any]) -> str:
    """The page for a summary (`summarise(...)`, with its timelines)."""
    return fill_template("page.html", {**summary, "warnings": warnings(summary)})


def write_page(summary: Mapping[str, Any], path: str | Path) -> None:
    """Write the page. Raises ScepsyError."""
    write_text(render_page(summary), path)


def fill_template(name: str, data: Mapping[str, Any]) -> str:
    """A template of this package as a whole page: with the style and script that all have in common, and its data."""
    # Inside a script element only the sign that could end it is special; as JSON it may be written as an escape.
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = _read(name).replace("/*STYLE*/", _read("common.css"), 1).replace("/*SCRIPT*/", _read("common.js"), 1)
    return page.replace("/*REPORT*/", embedded, 1)


def write_text(text: str, path: str | Path) -> None:
    """Write a page's text, into a directory that is made if it is not there. Raises ScepsyError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScepsyError(f"{path}: cannot be written: {error.strerror}") from error


def _read(name: str) -> str:
    return files("scepsy.report").joinpath(name).read_text(encoding="utf-8")

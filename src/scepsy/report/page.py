"""The report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from scepsy.report.summary import warnings
from scepsy_optimizer.errors import ScepsyError

_PLACE = "/*REPORT*/"


def render_page(summary: Mapping[str, Any]) -> str:
    """The page for a summary (`summarise(...)`, with its timelines)."""
    template = files("scepsy.report").joinpath("page.html").read_text(encoding="utf-8")
    # Inside a script element only the sign that could end it is special; as JSON it may be written as an escape.
    data = json.dumps({**summary, "warnings": warnings(summary)}, ensure_ascii=False, allow_nan=False)
    return template.replace(_PLACE, data.replace("<", "\\u003c"), 1)


def write_page(summary: Mapping[str, Any], path: str | Path) -> None:
    """Write the page. Raises ScepsyError."""
    try:
        Path(path).write_text(render_page(summary), encoding="utf-8")
    except OSError as error:
        raise ScepsyError(f"{path}: cannot be written: {error.strerror}") from error

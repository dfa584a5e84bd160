"""What the user has chosen to capture beyond the default, for every hook to read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

CONTENT_VARIABLE: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
"""OpenTelemetry's own switch: true, or where to record content, of which spans are the only place that Scepsy has."""
USAGE_VARIABLE: Final = "SCEPSY_INCLUDE_USAGE"
_ON: Final = frozenset({"true", "1"})
_IN_SPANS: Final = _ON | {"span_only", "span_and_event"}

Redact = Callable[[str], str | None]
"""Takes a text of a prompt or an answer and returns what may be recorded of it: None for nothing."""


@dataclass(slots=True)
class Settings:
    """What is recorded; as the environment says until `instrument` says otherwise."""

    record_content: bool = False
    redact: Redact | None = None
    include_usage: bool = False

    def reset(self) -> None:
        """Back to what the environment says."""
        self.record_content = os.environ.get(CONTENT_VARIABLE, "").strip().lower() in _IN_SPANS
        self.redact = None
        self.include_usage = os.environ.get(USAGE_VARIABLE, "").strip().lower() in _ON


settings: Final = Settings()
"""The process's own."""
settings.reset()

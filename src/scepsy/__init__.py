"""Scepsy: serve agentic workflows on your own GPUs.

Names are loaded on first use, so that importing this package in an agent costs only OpenTelemetry.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scepsy.capture import agent, instrument, tool, uninstrument, workflow

__version__ = "0.1.0"

_HOMES = {
    "agent": "scepsy.capture",
    "instrument": "scepsy.capture",
    "tool": "scepsy.capture",
    "uninstrument": "scepsy.capture",
    "workflow": "scepsy.capture",
}

__all__ = ["agent", "instrument", "tool", "uninstrument", "workflow"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Traces without touching the agents' code: an OTLP receiver, and a proxy that records the calls it carries.

`collect` runs both until it is told to end; `Recorder` is what the gateway of a deployment records with.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from scepsy.collect.calls import Recorder
    from scepsy.collect.serve import Counts, collect, collecting
    from scepsy.collect.store import TraceStore

_HOMES = {"Counts": "serve", "Recorder": "calls", "TraceStore": "store", "collect": "serve", "collecting": "serve"}

__all__ = ["Counts", "Recorder", "TraceStore", "collect", "collecting"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"scepsy.collect.{home}"), name)
    except ModuleNotFoundError as error:
        raise ScepsyError(f"collecting needs {error.name}: pip install 'scepsy[collect]'") from error

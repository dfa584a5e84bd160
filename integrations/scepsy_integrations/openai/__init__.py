"""The hook for the openai package."""

from __future__ import annotations

from scepsy.capture import FrameworkHook
from scepsy_integrations.openai.hook import instrument_client

__all__ = ["Instrumentor"]


class Instrumentor(FrameworkHook):
    """Turns the hook on for every client of the process, made before or after, or for one client alone."""

    parts = {"openai": "scepsy_integrations.openai.hook"}  # noqa: RUF012 - declared in the base
    instrument_client = staticmethod(instrument_client)

"""The hook for LlamaIndex and its workflows: a span handler and an event handler at the root of its dispatchers."""

from __future__ import annotations

import importlib.util
from typing import Any

__all__ = ["Instrumentor"]


def _installed() -> bool:
    return importlib.util.find_spec("llama_index") is not None and (
        importlib.util.find_spec("llama_index.core") is not None
    )


class Instrumentor:
    """Listens to LlamaIndex's own instrumentation; nothing of it is patched."""

    def instrument(self, **_kwargs: Any) -> None:
        """Turn it on, if LlamaIndex is installed."""
        if _installed():
            from scepsy_integrations.llama_index.handlers import turn_on

            turn_on()

    def uninstrument(self, **_kwargs: Any) -> None:
        """Turn it off."""
        if _installed():
            from scepsy_integrations.llama_index.handlers import turn_off

            turn_off()

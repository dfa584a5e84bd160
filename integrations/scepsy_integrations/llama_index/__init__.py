"""The hook for LlamaIndex and its workflows: a span handler and an event handler at the root of its dispatchers."""

from __future__ import annotations

from typing import Any

from scepsy.capture import no_longer, when_imported

__all__ = ["Instrumentor"]

_MODULE = "llama_index_instrumentation"


class Instrumentor:
    """Listens to LlamaIndex's own instrumentation; nothing of it is patched."""

    def instrument(self, **_kwargs: Any) -> None:
        """Turn it on, now or as soon as LlamaIndex is imported."""
        when_imported(_MODULE, _turn_on)

    def uninstrument(self, **_kwargs: Any) -> None:
        """Turn it off."""
        no_longer(_MODULE, _turn_on)
        if _on:
            from scepsy_integrations.llama_index.handlers import turn_off

            turn_off()
            _on.clear()


_on: list[bool] = []


def _turn_on() -> None:
    from scepsy_integrations.llama_index.handlers import turn_on

    turn_on()
    _on.append(True)

"""The hook for LangChain and LangGraph: a callback handler, for everything or by hand."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from scepsy.capture import no_longer, when_imported

if TYPE_CHECKING:
    from scepsy_integrations.langchain.handler import ScepsyCallbackHandler

__all__ = ["Instrumentor", "ScepsyCallbackHandler"]


def __getattr__(name: str) -> Any:
    if name != "ScepsyCallbackHandler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("langchain_core") is None:
        raise ImportError("ScepsyCallbackHandler needs LangChain: pip install 'scepsy[langchain]'")
    from scepsy_integrations.langchain.handler import ScepsyCallbackHandler

    return ScepsyCallbackHandler


_MODULE = "langchain_core.tracers.context"


class Instrumentor:
    """Gives every LangChain run of the process the handler, through LangChain's own hook for that."""

    def instrument(self, **_kwargs: Any) -> None:
        """Turn it on, now or as soon as LangChain is imported."""
        when_imported(_MODULE, _turn_on)

    def uninstrument(self, **_kwargs: Any) -> None:
        """Turn it off."""
        no_longer(_MODULE, _turn_on)
        if _on:
            from scepsy_integrations.langchain.handler import turn_off

            turn_off()
            _on.clear()


_on: list[bool] = []


def _turn_on() -> None:
    from scepsy_integrations.langchain.handler import turn_on

    turn_on()
    _on.append(True)

"""The hook for LangChain and LangGraph: a callback handler, for everything or by hand."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scepsy_integrations.langchain.handler import ScepsyCallbackHandler

__all__ = ["Instrumentor", "ScepsyCallbackHandler"]


def __getattr__(name: str) -> Any:
    if name != "ScepsyCallbackHandler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _installed():
        raise ImportError("ScepsyCallbackHandler needs LangChain: pip install 'scepsy[langchain]'")
    from scepsy_integrations.langchain.handler import ScepsyCallbackHandler

    return ScepsyCallbackHandler


def _installed() -> bool:
    return importlib.util.find_spec("langchain_core") is not None


class Instrumentor:
    """Gives every LangChain run of the process the handler, through LangChain's own hook for that."""

    def instrument(self, **_kwargs: Any) -> None:
        """Turn it on, if LangChain is installed."""
        if _installed():
            from scepsy_integrations.langchain.handler import turn_on

            turn_on()

    def uninstrument(self, **_kwargs: Any) -> None:
        """Turn it off."""
        if _installed():
            from scepsy_integrations.langchain.handler import turn_off

            turn_off()

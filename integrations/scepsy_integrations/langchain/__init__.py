"""The hook for LangChain and LangGraph: a callback handler, for everything or by hand."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from scepsy.capture import FrameworkHook

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


class Instrumentor(FrameworkHook):
    """Gives every LangChain run of the process the handler, through LangChain's own hook for that.

    Embeddings and document compressors, which know no handlers, have their methods hooked.
    """

    parts = {  # noqa: RUF012 - declared in the base
        "langchain_core.runnables.config": "scepsy_integrations.langchain.handler",
        "langchain_core.embeddings.embeddings": "scepsy_integrations.langchain.embeddings",
        "langchain_core.documents.compressor": "scepsy_integrations.langchain.compressors",
    }

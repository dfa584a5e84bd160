"""LangChain's embeddings: one that names its model is a call, merged as usual with the request that carries it.

One that names no model only wraps another (a cache does), or computes nothing worth a name.
"""

from __future__ import annotations

from typing import Final

from langchain_core.embeddings.embeddings import Embeddings

from scepsy import semconv
from scepsy.capture import Frame, end_call, guard_task, harmless, muted, recorder
from scepsy_integrations.langchain.methods import hook_methods, restore_methods

_METHODS: Final = ("embed_documents", "embed_query", "aembed_documents", "aembed_query")


class _CallFrame(Frame):
    """A frame whose handle is an LLM call: the request that carries it decides when it ended."""

    __slots__ = ()

    @harmless
    def end(self, error: BaseException | None = None) -> None:
        """It has returned, or raised `error`."""
        self.leave()
        end_call(self.handles[0], error)


def _start(embeddings: Embeddings) -> Frame | None:
    named = (getattr(embeddings, name, None) for name in ("model", "model_name"))
    model = next((name for name in named if isinstance(name, str)), None)
    if model is None or muted():
        return None
    handle = recorder.start(semconv.KIND_LLM, model, operation=semconv.EMBEDDINGS)
    guard_task(handle)
    return _CallFrame(handle)


def turn_on() -> None:
    """Hook all embeddings."""
    hook_methods(Embeddings, _METHODS, _start)


def turn_off() -> None:
    """Restore them."""
    restore_methods(Embeddings, _METHODS)

"""The hook for LlamaIndex and its workflows: a span handler and an event handler at the root of its dispatchers."""

from __future__ import annotations

from scepsy.capture import FrameworkHook

__all__ = ["Instrumentor"]


class Instrumentor(FrameworkHook):
    """Listens to LlamaIndex's own instrumentation; nothing of it is patched."""

    parts = {"llama_index_instrumentation": "scepsy_integrations.llama_index.handlers"}  # noqa: RUF012 - declared in the base

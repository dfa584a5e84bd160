"""LangChain's document compressors, rerankers among them: a step, whose calls have its name as role."""

from __future__ import annotations

from typing import Final

from langchain_core.documents.compressor import BaseDocumentCompressor

from scepsy import semconv
from scepsy.capture import Frame, muted, recorder
from scepsy_integrations.langchain.methods import hook_methods, restore_methods

_METHODS: Final = ("compress_documents", "acompress_documents")


def _start(compressor: BaseDocumentCompressor) -> Frame | None:
    return None if muted() else Frame(recorder.start(semconv.KIND_STEP, type(compressor).__name__))


def turn_on() -> None:
    """Hook all compressors."""
    hook_methods(BaseDocumentCompressor, _METHODS, _start)


def turn_off() -> None:
    """Restore them."""
    restore_methods(BaseDocumentCompressor, _METHODS)

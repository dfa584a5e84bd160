"""Names that frameworks give their own parts, which say nothing of what a call below is for."""

from __future__ import annotations

import re
from functools import lru_cache

from scepsy.traces.records import SpanRecord

_PARTS = re.compile(
    r"(Runnable\w*|ChatPromptTemplate|PromptTemplate|\w*OutputParser|LangGraph|_write|\w*Channel\w*|branch:.*"
    r"|\w*(LLM|OpenAI|OpenAILike)(\.\w+)?)(<.*>)?"
)


def keep_purpose(record: SpanRecord) -> None:
    """Take the label from the record of a step if it is a framework's own name."""
    if _is_part(record.label):
        record.label = ""


@lru_cache(maxsize=4096)
def _is_part(name: str) -> bool:
    return _PARTS.fullmatch(name) is not None

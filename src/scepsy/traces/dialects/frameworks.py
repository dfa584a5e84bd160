"""Names that frameworks give their own parts, which say nothing of what a call below is for."""

from __future__ import annotations

import re

_PARTS = re.compile(
    r"(Runnable\w*|ChatPromptTemplate|PromptTemplate|\w*OutputParser|LangGraph|_write|\w*Channel\w*|branch:.*"
    r"|\w*(LLM|OpenAI|OpenAILike)(\.\w+)?)(<.*>)?"
)


def purpose(name: str) -> str:
    """The name, or nothing if it is a framework's own."""
    return "" if _PARTS.fullmatch(name) else name

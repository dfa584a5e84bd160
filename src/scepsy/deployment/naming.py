"""Which model a request names: in a JSON body, in a form, or in its query."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import orjson
from aiohttp import web

_FORM_MODEL: Final = re.compile(rb'name="?model"?[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)\r\n')


def parsed(body: bytes) -> dict[str, Any] | None:
    """A body that is a JSON object; None for any other."""
    if body.lstrip()[:1] != b"{":
        return None
    try:
        content = orjson.loads(body)
    except ValueError:
        # What vLLM takes as well: NaN, Infinity, broken surrogates.
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return None
    return content if isinstance(content, dict) else None


def form_model(body: bytes, content_type: str) -> str | None:
    """The model that a form names; None if it is none, or names none."""
    found = _FORM_MODEL.search(body) if content_type == "multipart/form-data" else None
    return found[1].decode("utf-8", "replace") if found else None


def named_model(request: web.Request, body: bytes, content: Mapping[str, Any] | None) -> str | None:
    """The model that a request names in its body or else in its query."""
    name = content.get("model") if content is not None else form_model(body, request.content_type)
    name = name if name is not None else request.query.get("model")
    return name if isinstance(name, str) else None

"""Estimates kept on disk: the same question is answered from a file, in milliseconds instead of seconds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scepsy.files import load_profile, save_profile
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile


def cached_profile(question: Mapping[str, Any], llm: str, make: Callable[[], LLMProfile]) -> LLMProfile:
    """The profile that `make` gives, or the one kept for an equal question, under the served name `llm`.

    A question is everything that the answer depends on, as plain values. A file that cannot be read is made anew; a
    cache that cannot be written is none.
    """
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "estimates" / f"{digest}.yaml"
    if path.exists():
        with contextlib.suppress(ScepsyError):
            return replace(load_profile(path), llm=llm)
    profile = make()
    with contextlib.suppress(ScepsyError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under its own name only when whole: two processes may ask the same.
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(descriptor)
        try:
            save_profile(profile, name)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    return profile


def cache_folder() -> Path:
    """Where Scepsy keeps what it can make again: SCEPSY_CACHE, else scepsy in the user's cache folder."""
    own = os.environ.get("SCEPSY_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scepsy"

"""Workers of billiard's pools, which Celery uses: they leave past every exit hook of Python, if they are not killed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from scepsy.capture.imports import no_longer, when_imported
from scepsy.capture.patching import Method, Patch
from scepsy.capture.safety import harmless
from scepsy.capture.trace_file import flush_all

_MODULE: Final = "billiard.pool"
_patches: Final[list[Patch]] = []


def flush_at_exit_of_workers() -> None:
    """Let every worker write what waits before it leaves."""
    if not _patches:
        when_imported(_MODULE, _hook)


def restore_workers() -> None:
    """Undo that."""
    no_longer(_MODULE, _hook)
    while _patches:
        _patches.pop().undo()


def _hook() -> None:
    worker = getattr(sys.modules[_MODULE], "Worker", None)
    if not _patches and hasattr(worker, "_do_exit"):  # once it has told its pool that it is done, the pool kills it
        _patches.append(Patch(worker, "_do_exit", _flushing))


def _flushing(patch: Patch) -> Method:
    flush: Callable[[], Any] = harmless(flush_all)

    def leave(worker: Any, *args: Any, **kwargs: Any) -> Any:
        if patch.on:
            flush()
        return patch.original(worker, *args, **kwargs)

    return leave

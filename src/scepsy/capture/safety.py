"""Hooks run inside somebody else's program: what fails in them is logged once and goes no further."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

logger: Final = logging.getLogger("scepsy")

_told: set[tuple[str, type[BaseException]]] = set()


def tell(where: str, error: BaseException) -> None:
    """Log that capture failed at `where`: one line for each kind of error there, with its traceback at debug level.

    The error's own text is left out of the line: it may quote a prompt.
    """
    known = (where, type(error))
    if known not in _told:
        _told.add(known)
        logger.warning(
            "capture failed in %s (%s); the program goes on, this call may be missing", where, known[1].__name__
        )
        logger.debug("capture failed in %s", where, exc_info=error)


def harmless(hook: Callable[P, R]) -> Callable[P, R | None]:
    """Make a hook return None where it would raise."""
    where = f"{hook.__module__}.{hook.__qualname__}"

    @functools.wraps(hook)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return hook(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in capture must not reach the program
            tell(where, error)
            return None

    return guarded

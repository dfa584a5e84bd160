"""A method of somebody else's class or object with a hook in its place, until that is undone."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

Method = Callable[..., Any]


class Patch:
    """`owner.name`, replaced by what `hook` makes of this patch; called like the method, its object first.

    A hook calls `original` in any case, and does nothing else unless the patch is `on`.
    """

    __slots__ = ("_name", "_own", "_owner", "_replacement", "on", "original")

    def __init__(self, owner: Any, name: str, hook: Callable[[Patch], Method]) -> None:
        self.on = True
        self._owner = owner
        self._name = name
        self._own = vars(owner).get(name)
        found = getattr(owner, name)
        if isinstance(owner, type):
            self.original: Method = found
            self._replacement: Any = functools.wraps(found)(hook(self))
        else:
            self.original = getattr(found, "__func__", None) or (lambda _owner, *args, **kwargs: found(*args, **kwargs))
            self._replacement = types.MethodType(functools.wraps(found)(hook(self)), owner)
        setattr(owner, name, self._replacement)

    def undo(self) -> None:
        """Restore the method; if somebody else has wrapped it since, only fall silent."""
        self.on = False
        if vars(self._owner).get(self._name) is not self._replacement:
            return
        if self._own is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._own)

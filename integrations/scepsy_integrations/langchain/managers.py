"""LangChain's callback managers, hooked where they tell handlers of a start or an end.

A handler among their handlers would be told the same, at a price that has nothing to do with what it does: LangChain
looks through every handler's methods for each call, and tells it through coroutines and a turn of the event loop.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final

from langchain_core.callbacks import manager as langchain

from scepsy.capture import Method, Patch

Starting = Callable[[Any, Any, Any, tuple[Any, ...], dict[str, Any], Any], object]
"""Called with the manager, what its method has returned, `serialized`, the other arguments, and the awaiting task."""
Ending = Callable[[Any, tuple[Any, ...], dict[str, Any]], object]
"""Called with the id of the run, and the arguments of the run manager's method."""

_NEWER: Final = frozenset({"on_stream_event"})
"""Methods that older managers lack."""
_patches: Final[list[Patch]] = []


def hook_managers(starts: dict[str, Starting], ends: dict[str, dict[str, Ending]]) -> bool:
    """Call these after the start methods and before the end methods of their names, sync and async.

    End methods are those of the managers of a run, by the run's kind as their classes name it: "LLM", "Chain".
    False, and nothing is hooked, if this LangChain's managers are not as they have always been.
    """
    places = [place for place in (*_starts(starts), *_ends(ends)) if place[1] not in _NEWER or hasattr(*place[:2])]
    if not all(_as_known(owner, name) for owner, name, _ in places):
        return False
    _patches.extend(Patch(owner, name, hook) for owner, name, hook in places)
    return True


def restore_managers() -> None:
    """Undo `hook_managers`."""
    while _patches:
        _patches.pop().undo()


_Place = tuple[Any, str, Callable[[Patch], Method]]


def _starts(starts: dict[str, Starting]) -> Iterator[_Place]:
    for name, starting in starts.items():
        yield getattr(langchain, "CallbackManager", None), name, _started(starting)
        yield getattr(langchain, "AsyncCallbackManager", None), name, _started_async(starting)


def _ends(ends: dict[str, dict[str, Ending]]) -> Iterator[_Place]:
    for kind, of_kind in ends.items():
        for name, ending in of_kind.items():
            for prefix in ("", "Async"):
                yield getattr(langchain, f"{prefix}CallbackManagerFor{kind}Run", None), name, _ended(ending)


def _as_known(owner: Any, name: str) -> bool:
    method = vars(owner).get(name) if isinstance(owner, type) else None
    if not inspect.isfunction(method):
        return False
    if not name.endswith("_start"):
        return True
    asynchronous = owner.__name__.startswith("Async")
    return (
        list(inspect.signature(method).parameters)[:2] == ["self", "serialized"]
        and inspect.iscoroutinefunction(method) == asynchronous
    )


def _started(starting: Starting) -> Callable[[Patch], Method]:
    def hook(patch: Patch) -> Method:
        original = patch.original

        def method(self: Any, serialized: Any, *args: Any, **kwargs: Any) -> Any:
            made = original(self, serialized, *args, **kwargs)
            if patch.on:
                starting(self, made, serialized, args, kwargs, None)
            return made

        return method

    return hook


def _started_async(starting: Starting) -> Callable[[Patch], Method]:
    def hook(patch: Patch) -> Method:
        original = patch.original

        async def method(self: Any, serialized: Any, *args: Any, **kwargs: Any) -> Any:
            made = await original(self, serialized, *args, **kwargs)
            if patch.on:
                starting(self, made, serialized, args, kwargs, asyncio.current_task())
            return made

        return method

    return hook


def _ended(ending: Ending) -> Callable[[Patch], Method]:
    # For coroutine functions as well: the run has ended when this is called, not when LangChain's task for it runs.
    def hook(patch: Patch) -> Method:
        original = patch.original

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if patch.on:
                ending(self.run_id, args, kwargs)
            return original(self, *args, **kwargs)

        return method

    return hook

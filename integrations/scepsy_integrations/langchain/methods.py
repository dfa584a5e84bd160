"""Methods of LangChain's classes that no callback tells of: hooked in every class that defines them, later ones too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final

from scepsy.capture import Frame, harmless

Start = Callable[[Any], Frame | None]
"""Opens what a method of the given object is to run in, or None."""

_ORIGINAL: Final = "_scepsy_original"

_inside: ContextVar[object] = ContextVar("scepsy_langchain_inside", default=None)
"""The object whose method runs: what it calls on itself is part of that."""


def hook_methods(base: type, names: tuple[str, ...], start: Start) -> None:
    """Run these methods of `base` and all its subclasses, those still to be made as well, in the frame of `start`."""
    if "__init_subclass__" in vars(base):
        return
    safe_start = harmless(start)

    def made(cls: Any, /, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)  # type: ignore[arg-type] # mypy wants a class it knows by name
        _hook(cls, names, safe_start)

    base.__init_subclass__ = classmethod(made)  # type: ignore[assignment] # mypy knows it as a bound method
    for kind in (base, *_below(base)):
        _hook(kind, names, safe_start)


def restore_methods(base: type, names: tuple[str, ...]) -> None:
    """Undo `hook_methods`; where somebody else has wrapped a method since, it stays, and records nowhere."""
    if "__init_subclass__" in vars(base):
        del base.__init_subclass__
    for kind in (base, *_below(base)):
        for name in names:
            method: Any = vars(kind).get(name)
            original = getattr(method, _ORIGINAL, None)
            if original is not None and method.__wrapped__ is original:
                setattr(kind, name, original)


def _below(base: type) -> Iterator[type]:
    kind: type
    for kind in base.__subclasses__():
        yield kind
        yield from _below(kind)


@harmless
def _hook(kind: type, names: tuple[str, ...], start: Start) -> None:
    for name in names:
        method = vars(kind).get(name)
        if inspect.isfunction(method) and not hasattr(method, _ORIGINAL):
            setattr(kind, name, _hooked(method, start))


def _hooked(method: Callable[..., Any], start: Start) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: object, *args: Any, **kwargs: Any) -> Any:
        frame = None if _inside.get() is self else start(self)
        if frame is None:
            return method(self, *args, **kwargs)
        token = _inside.set(self)
        frame.enter()
        try:
            result = method(self, *args, **kwargs)
        except BaseException as error:
            frame.end(error)
            raise
        finally:
            _inside.reset(token)
        frame.end()
        return result

    @functools.wraps(method)
    async def run_async(self: object, *args: Any, **kwargs: Any) -> Any:
        frame = None if _inside.get() is self else start(self)
        if frame is None:
            return await method(self, *args, **kwargs)
        token = _inside.set(self)
        frame.enter()
        try:
            result = await method(self, *args, **kwargs)
        except BaseException as error:
            frame.end(error)
            raise
        finally:
            _inside.reset(token)
        frame.end()
        return result

    hooked = run_async if inspect.iscoroutinefunction(method) else run
    setattr(hooked, _ORIGINAL, method)
    return hooked

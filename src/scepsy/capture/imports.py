"""Hooks that wait for their framework: an agent pays only for the frameworks that it imports itself."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar, Final

from scepsy.capture.safety import harmless

_waiting: Final[dict[str, list[Callable[[], None]]]] = {}


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Run `action` now if `module` is imported, otherwise right after its first import."""
    if module in sys.modules:
        action()
        return
    _waiting.setdefault(module, []).append(action)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def no_longer(module: str, action: Callable[[], None]) -> None:
    """Take back a `when_imported` that has not happened."""
    actions = _waiting.get(module, [])
    if action in actions:
        actions.remove(action)
    if not actions:
        _waiting.pop(module, None)
    _leave_if_idle()


class FrameworkHook:
    """A framework's hook, as its entry point names it; each part turns on as soon as its module is imported."""

    parts: ClassVar[Mapping[str, str]] = {}
    """Per module of the framework, the module of ours whose `turn_on()` and `turn_off()` hook it and undo that."""

    def instrument(self, **_kwargs: Any) -> None:
        """Turn every part on, now or after the import that it waits for."""
        for module, ours in self.parts.items():
            when_imported(module, _turning_on(ours))

    def uninstrument(self, **_kwargs: Any) -> None:
        """Turn every part off."""
        for module, ours in self.parts.items():
            no_longer(module, _turning_on(ours))
            if ours in sys.modules:
                sys.modules[ours].turn_off()


@functools.cache
def _turning_on(ours: str) -> Callable[[], None]:
    return lambda: importlib.import_module(ours).turn_on()


class _Finder(MetaPathFinder):
    """Finds nothing itself; it lets the loader of a module that is waited for tell when it is done."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the import system fixes the signature
        target: ModuleType | None = None,  # noqa: ARG002 - as above
    ) -> ModuleSpec | None:
        """The module's real spec, if it is waited for."""
        if fullname not in _waiting or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return None
        load = spec.loader.exec_module

        def load_and_act(module: ModuleType) -> None:
            load(module)
            _act(fullname)

        try:
            spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        except AttributeError:  # a loader without room for it; the framework stays unhooked
            return None
        return spec


_finder: Final = _Finder()


def _leave_if_idle() -> None:
    if not _waiting and _finder in sys.meta_path:
        # A new list: an import of another thread, which goes through the old one, would miss a finder.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not _finder]


def _act(module: str) -> None:
    for action in _waiting.pop(module, []):
        harmless(action)()
    _leave_if_idle()

"""How far a long measurement is, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`text` says what has just happened, `done` of `points` measurements are finished.

    `left_s` is how long the rest will take, None where nothing is known of it yet.
    """

    text: str
    done: int
    points: int
    left_s: float | None


class Work:
    """Measurements to come, each with a guess of its time; what others of its kind took corrects the guess.

    A kind is the first word of a key: starts of engines, steps and loads err in different ways.
    """

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self._on_progress = on_progress
        self._guessed_s: dict[str, float] = {}
        self._finished: set[str] = set()
        self._taken_s: dict[str, tuple[float, float]] = {}

    def expect(self, engine: str, guesses_s: Mapping[str, float]) -> None:
        """Expect these measurements of an engine, whose name is in their keys, instead of those expected before."""
        before = {key for key in self._guessed_s if f" of {engine}:" in key}
        others_s = {key: guess_s for key, guess_s in self._guessed_s.items() if key not in before}
        self._guessed_s = {**others_s, **guesses_s}

    def tell(self, text: str) -> None:
        """Say what happens, between measurements."""
        self._on_progress(self._progress(text))

    def finish(self, key: str, text: str, *, took_s: float | None = None) -> None:
        """A measurement is done; `took_s` is None where it was done before."""
        self._finished.add(key)
        guess_s = self._guessed_s.setdefault(key, took_s or 0.0)
        if took_s is not None:
            taken_s, guessed_s = self._taken_s.get(_kind(key), (0.0, 0.0))
            self._taken_s[_kind(key)] = taken_s + took_s, guessed_s + guess_s
        self._on_progress(self._progress(text))

    def _progress(self, text: str) -> Progress:
        left = {key: guess_s for key, guess_s in self._guessed_s.items() if key not in self._finished}
        left_s = sum(self._correction(_kind(key)) * guess_s for key, guess_s in left.items())
        return Progress(
            text=text, done=len(self._finished), points=len(self._guessed_s), left_s=left_s if self._taken_s else None
        )

    def _correction(self, kind: str) -> float:
        taken_s, guessed_s = self._taken_s.get(kind, (0.0, 0.0))
        return taken_s / guessed_s if guessed_s else 1.0


def _kind(key: str) -> str:
    return key.partition(" ")[0]

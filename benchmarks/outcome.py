"""How a benchmark ends: its figures beside their bounds, as a table for people and one JSON line for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A figure and what it must not exceed (`at_most`) or fall below (`at_least`)."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the figure is within its bounds; one that is not a number is not."""
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


def finish(benchmark: str, bounds: Sequence[Bound], figures: Mapping[str, Any]) -> int:
    """Print the bounds and the JSON line; returns the exit code."""
    print()
    for bound in bounds:
        limit = f"at most {bound.at_most:g}" if bound.at_most is not None else f"at least {bound.at_least:g}"
        print(f"{'kept  ' if bound.kept else 'MISSED'}  {bound.name}: {bound.value:.4g} ({limit})")
    kept = all(bound.kept for bound in bounds)
    record = {
        "benchmark": benchmark,
        "kept": kept,
        "bounds": {
            bound.name: {"value": bound.value, "at_most": bound.at_most, "at_least": bound.at_least} for bound in bounds
        },
        **figures,
    }
    print(json.dumps(record))
    return 0 if kept else 1

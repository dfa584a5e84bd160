"""What a difference is worth that was measured again and again on a machine with other work: median and interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class Typical:
    """The median of many measurements, and an interval that holds the true median in 95 of 100 cases."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Typical:
        """By the order of the values alone (the sign test's interval): neither outliers nor distributions matter."""
        ordered = sorted(values)
        count = len(ordered)
        # Mean and deviation of how many of them lie below the true median; with too few values, all of them.
        rank = max(math.floor(count / 2 - 1.96 * math.sqrt(count) / 2), 0)
        return cls(median=median(ordered), low=ordered[rank], high=ordered[count - 1 - rank])

    def __str__(self) -> str:
        return f"{self.median:.0f} ({self.low:.0f} to {self.high:.0f})"

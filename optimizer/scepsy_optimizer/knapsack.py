"""The multiple-choice knapsack: one row from each table, least total cost, within a budget of units; exact.

Rows that a cheaper or equal row with no more units beats are dropped first. Then a Lagrange multiplier on the units
gives a lower bound and, with it, a feasible solution gives an upper one; a row whose reduced cost lifts the bound above
that solution cannot be part of any better one and is dropped as well. What is left, a few rows per table, is solved by
dynamic programming over the units. (Dropping by reduced cost: Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The row chosen from each table, and the total cost and units."""

    rows: tuple[int, ...]
    cost: float
    units: int


def solve(units: Sequence[Ints], costs: Sequence[Floats], budget: int) -> Packing | None:
    """Choose one row of each table; `units` must rise within each table, and be at least 1.

    Of several optima, one with the fewest units. Returns None where nothing fits.
    """
    kept = [_staircase(table_units, table_costs) for table_units, table_costs in zip(units, costs, strict=True)]
    if any(len(rows) == 0 for rows in kept):
        return None
    sizes = [table[rows] for table, rows in zip(units, kept, strict=True)]
    prices = [table[rows] for table, rows in zip(costs, kept, strict=True)]
    if sum(int(table[0]) for table in sizes) > budget:
        return None
    kept, sizes, prices = _reduce(kept, sizes, prices, budget)
    picked = _dynamic_program(sizes, prices, budget)
    return Packing(
        rows=tuple(int(rows[pick]) for rows, pick in zip(kept, picked, strict=True)),
        cost=float(sum(table[pick] for table, pick in zip(prices, picked, strict=True))),
        units=int(sum(table[pick] for table, pick in zip(sizes, picked, strict=True))),
    )


def _staircase(units: Ints, costs: Floats) -> Ints:
    """Rows that cost strictly less than every row before them, the cheapest of those with equal units."""
    usable = np.flatnonzero(np.isfinite(costs))
    order = usable[np.lexsort((costs[usable], units[usable]))]
    lowest = np.minimum.accumulate(costs[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = lowest[1:] < lowest[:-1]
    rows: Ints = order[first]
    return rows


def _reduce(
    kept: list[Ints], sizes: list[Ints], prices: list[Floats], budget: int
) -> tuple[list[Ints], list[Ints], list[Floats]]:
    """Drop the rows that no solution better than one already known can contain."""
    multiplier, upper = _multiplier(sizes, prices, budget)
    relaxed = [price + multiplier * size for size, price in zip(sizes, prices, strict=True)]
    floors = [float(table.min()) for table in relaxed]
    lower = sum(floors) - multiplier * budget
    # A little slack, so that rounding never drops the optimum itself, nor one of equal cost with fewer units.
    slack = upper - lower + 1e-9 * (abs(upper) + abs(lower))
    stay = [np.flatnonzero(table - floor <= slack) for table, floor in zip(relaxed, floors, strict=True)]
    return (
        [rows[index] for rows, index in zip(kept, stay, strict=True)],
        [table[index] for table, index in zip(sizes, stay, strict=True)],
        [table[index] for table, index in zip(prices, stay, strict=True)],
    )


def _multiplier(sizes: list[Ints], prices: list[Floats], budget: int) -> tuple[float, float]:
    """A multiplier at which the relaxed choice just fits, and the cost of the best fitting choice met on the way."""

    def relaxed(multiplier: float) -> tuple[int, float]:
        picks = [int(np.argmin(price + multiplier * size)) for size, price in zip(sizes, prices, strict=True)]
        total = sum(int(size[pick]) for size, pick in zip(sizes, picks, strict=True))
        return total, float(sum(price[pick] for price, pick in zip(prices, picks, strict=True)))

    total, cost = relaxed(0.0)
    if total <= budget:
        return 0.0, cost
    upper = float(sum(price[0] for price in prices))
    low, high = 0.0, max(float(price[0] - price[-1]) for price in prices) + 1e-12
    for _ in range(50):
        middle = (low + high) / 2
        total, cost = relaxed(middle)
        if total <= budget:
            high, upper = middle, min(upper, cost)
        else:
            low = middle
    return high, upper


def _dynamic_program(sizes: list[Ints], prices: list[Floats], budget: int) -> list[int]:
    best = np.zeros(budget + 1)
    picks = []
    for size, price in zip(sizes, prices, strict=True):
        following = np.full(budget + 1, np.inf)
        pick = np.full(budget + 1, -1)
        for row in range(len(size)):
            step = int(size[row])
            if step > budget:
                break
            candidate = best[: budget + 1 - step] + price[row]
            better = candidate < following[step:]
            following[step:][better] = candidate[better]
            pick[step:][better] = row
        best = following
        picks.append(pick)
    # `best` never rises with the units, so the first that reaches its last value uses the fewest.
    left = int(np.argmax(best <= best[budget] + 1e-12 * abs(best[budget])))
    chosen = []
    for size, pick in zip(reversed(sizes), reversed(picks), strict=True):
        row = int(pick[left])
        chosen.append(row)
        left -= int(size[row])
    return chosen[::-1]

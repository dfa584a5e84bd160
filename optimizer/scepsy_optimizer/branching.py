"""The best choice of one option per LLM, with a proof: relaxation, then branch and bound, cuts built on the way.

First the relaxation is driven to its optimum: its solution is retimed, the tangents there become cuts, and so on, each
time half way between the best point so far and the relaxation's (Ben-Ameur and Neto, Networks 2007), which takes a
sixth of the cuts that the relaxation's own points would. What is then left between the bound and the best choice is
closed by branch and bound in one tree (Quesada and Grossmann, 1992): a node splits the options of an LLM that is shared
between several into the smaller and the larger, and every choice that is met adds its tangents for all nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from scepsy_optimizer.knapsack import Packing, solve
from scepsy_optimizer.master import Floats, Ints, Master, Priced, Problem, Relaxed
from scepsy_optimizer.neighbours import best_exchange

_RELAXED_GAP = 1e-5
_MAX_CUTS = 150
_MAX_NODES = 5_000
_POINT_CUTS_EVERY = 3
"""At every such node the relaxed point becomes a cut, beside the choices that are met: more would cost more time."""

_WHOLE = 1e-6
_GUESSES = 2

_EXCHANGED = 1e-3
"""How far above the least cost options are exchanged, in parts of the bound."""
_MAX_EXCHANGES = 150
_MAX_IDLE = 12
"""Exchanges one after another that only gave new cuts, after which no more are tried."""

_WINDOW = 1e-3
_WINDOW_GROWTH = 4.0
"""How far above the least cost options are looked at, in parts of the bound, and how fast that grows."""

Retime = Callable[[Floats], tuple[Floats, Floats, Floats]]
"""Mean makespan, fixed part and coefficients of each group at given speeds (a row per LLM)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """The choices met, best first, as rows of the LLMs' tables with their objective, and a lower bound on any."""

    choices: tuple[tuple[float, tuple[int, ...]], ...]
    lower_bound_s: float


def minimise(problem: Problem, retime: Retime, *, gap: float) -> Found:
    """The best choice within `gap` of the lower bound; no choices where none keeps the budgets and limits."""
    search = _Search(problem, retime, gap)
    first = search.guess()
    if search.has_gap and search.relax(first) and search.has_gap:
        search.branch()
    return search.found()


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """A part of the choices: for each LLM the first and last of its held options, in order, that may be taken."""

    lows: Ints
    highs: Ints


def _halves(node: _Node, llm: int, rank: int) -> tuple[_Node, _Node]:
    """The part in which an LLM takes an option up to that rank, and the part in which it takes one above."""
    smaller, larger = node.highs.copy(), node.lows.copy()
    smaller[llm], larger[llm] = rank, rank + 1
    return _Node(node.lows, smaller), _Node(larger, node.highs)


class _Search:
    def __init__(self, problem: Problem, retime: Retime, gap: float) -> None:
        self._problem = problem
        self._retime = retime
        self._gap = gap
        self._master = Master(problem)
        self._met: dict[tuple[int, ...], float] = {}
        self._seen: set[tuple[int, ...]] = set()
        self._best_s = float("inf")
        self._explored = 0
        self._bound_s = -float("inf")
        # The best bound of the relaxation, with every option's cost at its duals; `_bound_s` may be higher.
        self._priced: Priced | None = None

    @property
    def has_gap(self) -> bool:
        """Whether a choice may exist that is better than the best by more than the gap."""
        return self._bound_s < self._best_s * (1 - self._gap)

    def found(self) -> Found:
        ranked = sorted((objective_s, rows) for rows, objective_s in self._met.items())
        return Found(choices=tuple(ranked), lower_bound_s=min(self._bound_s, self._best_s))

    def _promises(self, rows: tuple[int, ...]) -> bool:
        """Whether a choice may be better than the best, by the cuts so far."""
        floors_s = self._master.floors_s(self._speeds_of(rows))
        return float(self._problem.group_weights @ floors_s) < self._best_s

    def meet(self, rows: tuple[int, ...]) -> None:
        """Retime a choice: its tangents become cuts and, if it keeps budgets and limits, it may be the best."""
        if rows in self._seen:
            return
        self._seen.add(rows)
        makespans_s, _ = self._cut(self._speeds_of(rows))
        problem = self._problem
        taken = sum(units[row] for units, row in zip(problem.units, rows, strict=True))
        within = (problem.limited @ makespans_s <= problem.limits_s * (1 + 1e-9)).all()
        if within and (taken <= problem.budgets).all() and problem.accepts(rows):
            self._met[rows] = float(problem.group_weights @ makespans_s)
            self._best_s = min(self._best_s, self._met[rows])

    def guess(self) -> tuple[int, ...]:
        """A choice to begin with: the best for the tangent at a few, by knapsack, with what the areas alone allow.

        Where the critical path does not move and nothing else binds, its tangent is the makespan, and the choice is
        proven best already.
        """
        problem = self._problem
        rows = tuple(len(table) // 2 for table in problem.speeds)
        for _ in range(_GUESSES):
            _, fixed_s, coefficients = self._retime(self._speeds_of(rows))
            blended = np.tensordot(problem.group_weights, coefficients, 1)
            packing = self._by_knapsack([speeds @ row for speeds, row in zip(problem.speeds, blended, strict=True)])
            if packing is None:
                # Nothing fits: no choice is better than none.
                self._bound_s = float("inf")
                break
            rows = packing.rows
            self._bound_s = max(self._bound_s, packing.cost + float(problem.group_weights @ fixed_s))
            self.meet(rows)
            if not self.has_gap:
                break
        return rows

    def _by_knapsack(self, costs: Sequence[Floats]) -> Packing | None:
        """The choice of least cost within the areas together."""
        problem = self._problem
        areas = [units[:, : problem.areas].sum(axis=1) for units in problem.units]
        return solve(areas, costs, int(problem.budgets[: problem.areas].sum()))

    def relax(self, first: tuple[int, ...]) -> bool:
        """Solve the relaxation over all options and meet a choice next to its solution; False if it has none."""
        problem, master = self._problem, self._master
        for llm, (row, units) in enumerate(zip(first, problem.units, strict=True)):
            total = units.sum(axis=1)
            for start in {row, int(total.argmin()), int(total.argmax())}:
                master.hold(llm, start)
        centre, centre_s = self._speeds_of(first), float("inf")
        for _ in range(_MAX_CUTS):
            solved = self._solve_over_all()
            if solved.violation > _WHOLE:
                return False
            point = self._mean_speeds(solved)
            makespans_s, _, _ = self._retime(point)
            value_s = float(problem.group_weights @ makespans_s)
            keeps_limits = (problem.limited @ makespans_s <= problem.limits_s * (1 + _RELAXED_GAP)).all()
            if keeps_limits and self._bound_s >= value_s * (1 - _RELAXED_GAP):
                break
            if value_s < centre_s:
                centre, centre_s = point, value_s
            query = (centre + point) / 2
            query_s = float(problem.group_weights @ self._cut(query)[0])
            if query_s < centre_s:
                centre, centre_s = query, query_s
        self._exchange(self._rounded(solved))
        return True

    def _exchange(self, rows: tuple[int, ...]) -> None:
        """Meet a choice and better ones, by exchanges in one or two LLMs as long as the cuts promise something."""
        problem, priced = self._problem, self._priced
        assert priced is not None  # noqa: S101 - the relaxation has been solved
        window_s = _EXCHANGED * abs(priced.bound_s)
        near = [
            np.union1d(row, np.flatnonzero(totals - totals.min() <= window_s))
            for row, totals in zip(rows, priced.totals_s, strict=True)
        ]
        self.meet(rows)
        now_s = self._met.get(rows, float("inf"))
        idle = 0
        for _ in range(_MAX_EXCHANGES):
            speeds = self._speeds_of(rows)

            def rate(exchanged: tuple[Ints, Ints], speeds: Floats = speeds) -> Floats:
                llms, options = exchanged
                others = np.zeros((*llms.shape, 3))
                for llm, table in enumerate(problem.speeds):
                    others[llms == llm] = table[options[llms == llm]]
                return self._master.exchanged_s(speeds, llms, others)

            found = best_exchange(problem, priced.costs_s, rows, near, rate)
            if found is None or found[0] >= now_s * (1 - _RELAXED_GAP):
                break
            # The cuts may promise too much; those of this choice then tell, and another exchange is tried.
            if found[1] in self._seen:
                break
            self.meet(found[1])
            value_s = self._met.get(found[1], float("inf"))
            idle += 1
            if value_s < now_s:
                now_s, rows, idle = value_s, found[1], 0
            if not self.has_gap or idle > _MAX_IDLE:
                break

    def branch(self) -> None:
        """Close what is left between the bound and the best choice.

        Only options within a window above the least cost are looked at; the window grows until no other could matter.
        """
        assert self._priced is not None  # noqa: S101 - the relaxation has been solved
        relaxed_s, totals_s = self._priced.bound_s, self._priced.totals_s
        window_s = 0.0
        while self.has_gap and relaxed_s + window_s < self._best_s * (1 - self._gap):
            window_s = max(_WINDOW_GROWTH * window_s, _WINDOW * abs(relaxed_s))
            window_s = min(window_s, self._best_s - relaxed_s)
            held = [
                self._master.hold(llm, row)
                for llm, costs in enumerate(totals_s)
                for row in np.flatnonzero(costs - costs.min() <= window_s + 1e-9 * abs(relaxed_s)).tolist()
            ]
            if not any(held) and len(held) == sum(len(costs) for costs in totals_s):
                window_s = float("inf")
            self._bound_s = max(self._bound_s, min(self._tree(), relaxed_s + window_s))

    def _tree(self) -> float:
        """Branch and bound over the held options; returns a lower bound on all choices of them."""
        master, problem = self._master, self._problem
        ranks = self._ranks()
        last = np.array([ranks[master.owners == llm].max() for llm in range(len(problem.speeds))])
        order = count()
        heap = [(self._bound_s, next(order), _Node(np.zeros_like(last), last))]
        pruned_s = float("inf")
        for _ in range(_MAX_NODES):
            if not heap or heap[0][0] >= self._best_s * (1 - self._gap):
                break
            _, _, node = heapq.heappop(heap)
            master.allow((ranks >= node.lows[master.owners]) & (ranks <= node.highs[master.owners]))
            value_s, parts = self._explore(node, ranks)
            if not parts:
                pruned_s = min(pruned_s, value_s)
            for part in parts:
                heapq.heappush(heap, (value_s, next(order), part))
        return min([pruned_s, *(bound_s for bound_s, _, _ in heap)])

    def _explore(self, node: _Node, ranks: Ints) -> tuple[float, list[_Node]]:
        """Solve a node, with new cuts while it ends in a whole choice; its bound, and its parts if it must be split."""
        while True:
            solved = self._master.solve()
            if solved is None or solved.violation > _WHOLE:
                return float("inf"), []
            if solved.value >= self._best_s * (1 - self._gap):
                return solved.value, []
            split = self._split(solved, ranks)
            rows = self._rounded(solved)
            if rows not in self._seen and (split is None or self._promises(rows)):
                self.meet(rows)
            elif split is None and not self._problem.accepts(rows):
                parts = self._without(node, rows, ranks)
                return solved.value if parts else float("inf"), parts
            elif split is None and self._cut(self._speeds_of(rows))[1] == 0:
                # A whole choice whose own tangents are there: the value is what it gives.
                return solved.value, []
            if split is not None:
                self._explored += 1
                if self._explored % _POINT_CUTS_EVERY == 0:
                    self._cut(self._mean_speeds(solved))
                return solved.value, list(_halves(node, *split))

    def _without(self, node: _Node, rows: tuple[int, ...], ranks: Ints) -> list[_Node]:
        """Parts of a node that together are all of it but one choice."""
        parts: list[_Node] = []
        for llm, row in enumerate(rows):
            rank = int(ranks[(self._master.owners == llm) & (self._master.rows == row)][0])
            if node.lows[llm] < rank:
                parts.append(_halves(node, llm, rank - 1)[0])
            if rank < node.highs[llm]:
                parts.append(_halves(node, llm, rank)[1])
            node = _halves(_halves(node, llm, rank)[0], llm, rank - 1)[1]
        return parts

    def _split(self, solved: Relaxed, ranks: Ints) -> tuple[int, int] | None:
        """The LLM whose options differ most in the price of what they take, and the rank after which to split them.

        None where each LLM takes one option only.
        """
        master, problem = self._master, self._problem
        prices = np.maximum(0.0, -solved.duals[len(problem.speeds) :][: len(problem.budgets)])
        best, widest = None, -1.0
        for llm, units in enumerate(problem.units):
            mine = np.flatnonzero((master.owners == llm) & (solved.parts > _WHOLE))
            if len(mine) < 2:
                continue
            parts = solved.parts[mine] / solved.parts[mine].sum()
            price = units[master.rows[mine]] @ prices
            width = float(parts @ np.abs(price - parts @ price))
            if width > widest:
                last = int(np.clip(np.floor(ranks[mine] @ parts), ranks[mine].min(), ranks[mine].max() - 1))
                best, widest = (llm, last), width
        return best

    def _ranks(self) -> Ints:
        """The rank of each held option among its LLM's, by size and then by speed."""
        master = self._master
        ranks = np.zeros(len(master.rows), dtype=int)
        for llm, (speeds, units) in enumerate(zip(self._problem.speeds, self._problem.units, strict=True)):
            mine = np.flatnonzero(master.owners == llm)
            rows = master.rows[mine]
            ranks[mine[np.lexsort((rows, speeds[rows, 2], units[rows].sum(axis=1)))]] = np.arange(len(mine))
        return ranks

    def _solve_over_all(self) -> Relaxed:
        """The relaxation over every option: solved over the held ones, pricing in what is missing."""
        while True:
            solved = self._master.solve()
            assert solved is not None  # noqa: S101 - every LLM holds an option, and excesses are only dear
            priced = self._master.price(solved.duals)
            if self._priced is None or priced.bound_s > self._priced.bound_s:
                self._priced = priced
                self._bound_s = max(self._bound_s, priced.bound_s)
            if priced.bound_s >= solved.value - _RELAXED_GAP / 10 * abs(solved.value):
                return solved
            improving = [self._master.hold(llm, int(totals.argmin())) for llm, totals in enumerate(priced.totals_s)]
            if not any(improving):
                return solved

    def _rounded(self, solved: Relaxed) -> tuple[int, ...]:
        """A choice next to a relaxed one: of each LLM's options the largest part, the smaller where it does not fit."""
        master, problem = self._master, self._problem
        picked, smaller = [], []
        for llm in range(len(problem.speeds)):
            mine = np.flatnonzero((master.owners == llm) & (solved.parts > _WHOLE))
            rows = master.rows[mine]
            picked.append(int(rows[solved.parts[mine].argmax()]))
            smaller.append(int(rows[problem.units[llm][rows].sum(axis=1).argmin()]))
        taken = sum(units[row] for units, row in zip(problem.units, picked, strict=True))
        for llm, row in enumerate(smaller):
            if (taken <= problem.budgets).all():
                break
            taken = taken + problem.units[llm][row] - problem.units[llm][picked[llm]]
            picked[llm] = row
        return tuple(picked)

    def _cut(self, speeds: Floats) -> tuple[Floats, int]:
        """Retime at some speeds; returns the groups' makespans, and how many cuts that gave."""
        makespans_s, fixed_s, coefficients = self._retime(speeds)
        return makespans_s, self._master.cut(speeds, makespans_s, fixed_s, coefficients)

    def _speeds_of(self, rows: tuple[int, ...]) -> Floats:
        return np.array([speeds[row] for speeds, row in zip(self._problem.speeds, rows, strict=True)])

    def _mean_speeds(self, solved: Relaxed) -> Floats:
        means = np.zeros((len(self._problem.speeds), 3))
        for held in np.flatnonzero(solved.parts > 0).tolist():
            llm, row = int(self._master.owners[held]), int(self._master.rows[held])
            means[llm] += solved.parts[held] * self._problem.speeds[llm][row]
        return means

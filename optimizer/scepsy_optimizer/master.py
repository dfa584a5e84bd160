"""The master problem: one option per LLM, the least latency that all cuts allow, within the budgets and limits.

Executions are put into groups; the mean makespan of each group is bounded from below by the tangents built so far
(its cuts). The relaxation lets an LLM take parts of several options, which makes a linear program, solved by HiGHS
(Huangfu and Hall, Math. Prog. Comp. 2018). It holds few options at first; `price` finds those that would improve it
(Dantzig and Wolfe, 1960), and bounds the problem over all options, held or not: its Lagrangian at the duals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int_]
Floats = NDArray[np.float64]

_PENALTY = 1e4
"""What exceeding a budget or a limit by all of itself costs, in multiples of the problem's scale."""

_LEAST_MEASURE, _MOST_MEASURE = 1e-3, 1e3
"""What the excess over a limit is measured in is the limit itself within these, in multiples of the problem's scale.

Beyond them the linear program would be lost: HiGHS takes a coefficient up to 1e-9 for none.
"""

_LIFT = 1e-6
"""A cut that lifts the bound where it was made by less than this, in parts of the problem's scale, is not kept."""

_MANY_CUTS = 200
_IDLE_SOLVES = 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What is to be chosen, and what binds it.

    For LLM i, `speeds[i]` has a row per option of fixed_s, input_s, output_s and `units[i]` a row of what it takes of
    each budget. A group's mean makespan counts `group_weights[g]` times in the objective; the groups of `limited[w]`
    (a mask) may add up to `limits_s[w]`. `scale_s` is the order of magnitude of the objective. The first `areas`
    budgets are of one unit, so that their sum is a budget as well. `accepts` says of a choice (a row per LLM) that
    keeps all budgets whether it is possible: what no linear row says.
    """

    speeds: Sequence[Floats]
    units: Sequence[Ints]
    budgets: Ints
    group_weights: Floats
    limited: NDArray[np.bool_]
    limits_s: Floats
    scale_s: float
    areas: int
    accepts: Callable[[tuple[int, ...]], bool]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Priced:
    """The problem at some duals: a lower bound over all options, and what each option costs.

    `costs_s` are what the tangents, blended by the duals, make of each option; `totals_s` add what it takes of the
    budgets, at their duals. An option whose total is above its LLM's least by more than the distance of a known
    solution to the bound is in no better one.
    """

    bound_s: float
    costs_s: Sequence[Floats]
    totals_s: Sequence[Floats]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relaxed:
    """A solution of the relaxation: `value` with what is violated counted in, and the part of each held option.

    `violation` is the sum of the excesses over budgets and limits, each in parts of what it is measured in, 0 where
    there is none.
    """

    value: float
    violation: float
    parts: Floats
    duals: Floats


class Master:
    """The relaxation with its cuts and the options that it holds."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._groups = len(problem.group_weights)
        self._llms = len(problem.speeds)
        self._budgets = len(problem.budgets)
        self._limits = len(problem.limits_s)
        self._first_cut = self._llms + self._budgets + self._limits
        self._cut_group: list[int] = []
        self._cut_fixed_s: list[float] = []
        self._cuts: list[Floats] = []
        self._cut_used: list[int] = []
        self._solved = 0
        self._held: dict[tuple[int, int], int] = {}
        self.owners = np.zeros(0, dtype=int)
        """The LLM of each held option."""
        self.rows = np.zeros(0, dtype=int)
        """Its row in the LLM's table."""
        self._highs = _quiet_highs()
        self._build()

    def _build(self) -> None:
        """The columns of groups and excesses, and the rows of LLMs, budgets and limits; options and cuts come later."""
        problem, infinity = self._problem, highspy.kHighsInf
        for weight in problem.group_weights:
            self._highs.addCol(float(weight), -infinity, infinity, 0, _NO_INDEX, _NO_VALUE)
        for _ in range(self._budgets + self._limits):
            self._highs.addCol(_PENALTY * problem.scale_s, 0.0, infinity, 0, _NO_INDEX, _NO_VALUE)
        for _ in range(self._llms):
            self._highs.addRow(1.0, 1.0, 0, _NO_INDEX, _NO_VALUE)
        for number, budget in enumerate(problem.budgets.tolist()):
            excess = np.array([self._groups + number], dtype=np.int32)
            self._highs.addRow(-infinity, float(budget), 1, excess, np.array([-max(1.0, float(budget))]))
        measures_s = np.clip(problem.limits_s, _LEAST_MEASURE * problem.scale_s, _MOST_MEASURE * problem.scale_s)
        for number, (limit_s, measure_s) in enumerate(zip(problem.limits_s.tolist(), measures_s.tolist(), strict=True)):
            groups = np.flatnonzero(problem.limited[number])
            columns = np.append(groups, self._groups + self._budgets + number).astype(np.int32)
            self._highs.addRow(-infinity, limit_s, len(columns), columns, np.append(np.ones(len(groups)), -measure_s))
        self._first_option = self._groups + self._budgets + self._limits

    def hold(self, llm: int, row: int) -> bool:
        """Take an option into the relaxation; whether it is new there."""
        if (llm, row) in self._held:
            return False
        self._held[llm, row] = len(self.rows)
        self.owners = np.append(self.owners, llm)
        self.rows = np.append(self.rows, row)
        units = self._problem.units[llm][row]
        taken = np.flatnonzero(units)
        indices = [np.array([llm]), self._llms + taken]
        values: list[Floats] = [np.ones(1), units[taken].astype(float)]
        if self._cuts:
            costs = np.array([cut[llm] for cut in self._cuts]) @ self._problem.speeds[llm][row]
            there = np.flatnonzero(costs)
            indices.append(self._first_cut + there)
            values.append(-costs[there])
        column = np.concatenate(indices).astype(np.int32)
        self._highs.addCol(0.0, 0.0, highspy.kHighsInf, len(column), column, np.concatenate(values))
        return True

    def cut(self, speeds: Floats, makespans_s: Floats, fixed_s: Floats, coefficients: Floats) -> int:
        """Bound every group's makespan by its tangent at those speeds, where the cuts so far are too low there.

        The tangents are `fixed_s[g] + coefficients[g] · speeds`, summed over LLMs, and `makespans_s[g]` at `speeds`.
        Returns how many cuts are new.
        """
        least_s = self.floors_s(speeds)
        tolerance_s = _LIFT * self._problem.scale_s / self._groups
        held = np.array(
            [self._problem.speeds[llm][row] for llm, row in zip(self.owners, self.rows, strict=True)]
        ).reshape(-1, 3)
        low = np.flatnonzero(makespans_s > least_s + tolerance_s).tolist()
        for group in low:
            costs = (coefficients[group][self.owners] * held).sum(axis=1)
            there = np.flatnonzero(costs)
            columns = np.concatenate([[group], self._first_option + there]).astype(np.int32)
            values = np.concatenate([[1.0], -costs[there]])
            self._highs.addRow(float(fixed_s[group]), highspy.kHighsInf, len(columns), columns, values)
            self._cut_group.append(group)
            self._cut_fixed_s.append(float(fixed_s[group]))
            self._cuts.append(coefficients[group])
            self._cut_used.append(self._solved)
        return len(low)

    def _drop_idle_cuts(self) -> None:
        """Forget the cuts that have bound nothing for a while: they would only slow the solving down."""
        idle = [number for number, used in enumerate(self._cut_used) if used < self._solved - _IDLE_SOLVES]
        if len(self._cuts) <= _MANY_CUTS or not idle:
            return
        rows = (self._first_cut + np.array(idle)).astype(np.int32)
        self._highs.deleteRows(len(rows), rows)
        gone = set(idle)
        stay = [number for number in range(len(self._cuts)) if number not in gone]
        self._cut_group = [self._cut_group[number] for number in stay]
        self._cut_fixed_s = [self._cut_fixed_s[number] for number in stay]
        self._cuts = [self._cuts[number] for number in stay]
        self._cut_used = [self._cut_used[number] for number in stay]

    def floors_s(self, speeds: Floats) -> Floats:
        """What the cuts so far say of each group's makespan at those speeds."""
        floors_s = np.full(self._groups, -np.inf)
        if self._cuts:
            values = np.array(self._cut_fixed_s) + np.tensordot(np.array(self._cuts), speeds, 2)
            np.maximum.at(floors_s, np.array(self._cut_group), values)
        return floors_s

    def exchanged_s(self, speeds: Floats, llms: Ints, others: Floats) -> Floats:
        """What the cuts so far say of the objective where two LLMs have other speeds, a row per such exchange.

        `llms` has a column for each of the two, `others` the speeds of each on its second axis.
        """
        order = np.argsort(self._cut_group, kind="stable")
        groups = np.array(self._cut_group)[order]
        cuts = np.array(self._cuts)[order]
        values = np.array(self._cut_fixed_s)[order] + np.tensordot(cuts, speeds, 2)
        changes = others - speeds[llms]
        totals = np.broadcast_to(values[:, None], (len(cuts), len(llms))).copy()
        for column in range(llms.shape[1]):
            totals += np.einsum("cek,ek->ce", cuts[:, llms[:, column]], changes[:, column])
        firsts = np.flatnonzero(np.append(True, np.diff(groups) > 0))
        found: Floats = self._problem.group_weights[groups[firsts]] @ np.maximum.reduceat(totals, firsts, axis=0)
        return found

    def allow(self, allowed: NDArray[np.bool_]) -> None:
        """Which of the held options may be taken."""
        columns = (self._first_option + np.arange(len(self.rows))).astype(np.int32)
        upper = np.where(allowed, highspy.kHighsInf, 0.0)
        self._highs.changeColsBounds(len(columns), columns, np.zeros(len(columns)), upper)

    def solve(self) -> Relaxed | None:
        """Solve the relaxation over the held options; None where an LLM has none that is allowed."""
        self._drop_idle_cuts()
        self._highs.run()
        self._solved += 1
        if self._highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        solution = self._highs.getSolution()
        columns, duals = np.array(solution.col_value), np.array(solution.row_dual)
        for number in np.flatnonzero(np.abs(duals[self._first_cut :]) > 0).tolist():
            self._cut_used[number] = self._solved
        return Relaxed(
            value=self._highs.getInfo().objective_function_value,
            violation=float(columns[self._groups : self._first_option].sum()),
            parts=columns[self._first_option :],
            duals=duals,
        )

    def price(self, duals: Floats) -> Priced:
        """The Lagrangian at the duals, over all options."""
        problem = self._problem
        prices = np.maximum(0.0, -duals[self._llms : self._first_cut])
        limit_prices = prices[self._budgets :]
        weights = problem.group_weights + limit_prices @ problem.limited
        cut_duals = np.maximum(0.0, duals[self._first_cut :])
        groups = np.array(self._cut_group)
        sums = np.bincount(groups, cut_duals, minlength=self._groups)
        # Duals satisfy this up to rounding; the bound holds where it is exact.
        cut_duals *= np.divide(weights, sums, out=np.ones_like(sums), where=sums > 0)[groups]
        blended = np.tensordot(cut_duals, np.array(self._cuts), 1)
        unit_prices = prices[: self._budgets]
        bound = float(cut_duals @ np.array(self._cut_fixed_s))
        bound -= float(unit_prices @ problem.budgets) + float(limit_prices @ problem.limits_s)
        costs = [speeds @ blended[llm] for llm, speeds in enumerate(problem.speeds)]
        totals = [cost + units @ unit_prices for cost, units in zip(costs, problem.units, strict=True)]
        return Priced(
            bound_s=bound + float(sum(total.min() for total in totals)),
            costs_s=costs,
            totals_s=totals,
        )


def can_pack(units: Sequence[Ints], budgets: Ints) -> bool:
    """Whether one row of each table fits into the budgets together; exact, by HiGHS."""
    highs = _quiet_highs()
    infinity = highspy.kHighsInf
    # The least excess over all budgets is 0 where everything fits.
    for _ in budgets:
        highs.addCol(1.0, 0.0, infinity, 0, _NO_INDEX, _NO_VALUE)
    first = len(budgets)
    sizes = [len(table) for table in units]
    columns = np.arange(first, first + sum(sizes), dtype=np.int32)
    nothing, ones = np.zeros(len(columns)), np.ones(len(columns))
    highs.addCols(len(columns), nothing, nothing, ones, 0, np.zeros(len(columns), dtype=np.int32), _NO_INDEX, _NO_VALUE)
    for chosen in np.split(columns, np.cumsum(sizes)[:-1]):
        highs.addRow(1.0, 1.0, len(chosen), chosen, np.ones(len(chosen)))
    for number, budget in enumerate(budgets.tolist()):
        taken = np.concatenate([table[:, number] for table in units]).astype(float)
        highs.addRow(-infinity, budget, len(columns) + 1, np.append(columns, np.int32(number)), np.append(taken, -1.0))
    highs.changeColsIntegrality(len(columns), columns, np.full(len(columns), highspy.HighsVarType.kInteger))
    highs.run()
    return highs.getModelStatus() == highspy.HighsModelStatus.kOptimal and bool(
        highs.getInfo().objective_function_value < 0.5
    )


class _WithoutCallbacks(highspy.Highs):
    """HiGHS 1.16 greets on standard output when it is given callbacks, before it can be told to be quiet."""

    def enableCallbacks(self) -> None:  # noqa: N802 - HiGHS's name
        """Leave them out: none are used."""


def _quiet_highs() -> highspy.Highs:
    highs = _WithoutCallbacks()  # type: ignore[no-untyped-call]
    highs.setOptionValue("output_flag", False)  # noqa: FBT003 - HiGHS takes its options by position
    highs.setOptionValue("threads", 1)
    return highs


_NO_INDEX = np.array([], dtype=np.int32)
_NO_VALUE = np.array([], dtype=float)

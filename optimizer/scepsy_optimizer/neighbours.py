"""Choices next to the best one: one or two LLMs take something else, for little more.

The closed form is not exact, so a replay judges between choices that it finds nearly equal. That is worth it only where
they differ in what the closed form may have wrong, so of choices that are alike (`labels`) the best one stands for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from scepsy_optimizer.master import Floats, Ints, Problem

_MAX_ROWS = 80
"""Options of an LLM that are looked at: of each label those that no other beats in cost and area, the nearest first."""

_TRIES_EACH = 5
_MAX_RATED = 4000
_CHUNK = 20_000


def neighbours(
    problem: Problem,
    retime: Callable[[Floats], tuple[Floats, Floats, Floats]],
    best: Sequence[int],
    labels: Sequence[Ints],
    *,
    within: float,
    most: int,
) -> list[tuple[float, tuple[int, ...]]]:
    """Up to `most` choices that differ in labels, the given best one among them: objective and rows, best first.

    The others keep all budgets and limits and are at most `within` (a part) above it; up to two LLMs take another
    option. The tangent at the best bounds them from below, which is the order in which they are tried.
    """
    makespans_s, _, coefficients = retime(_speeds_of(problem, best))
    blended = np.tensordot(problem.group_weights, coefficients, 1)
    best_s = float(problem.group_weights @ makespans_s)
    spare_s = within * best_s
    room = problem.budgets - sum(units[row] for units, row in zip(problem.units, best, strict=True))
    rows, costs_s, takes = [], [], []
    for llm, (speeds, units, row) in enumerate(zip(problem.speeds, problem.units, best, strict=True)):
        cost_s = (speeds - speeds[row]) @ blended[llm]
        kept = _worth_a_look(cost_s, units[:, : problem.areas].sum(axis=1), labels[llm], spare_s)
        rows.append(np.append(row, kept))
        costs_s.append(cost_s[rows[-1]])
        takes.append(units[rows[-1]] - units[row])
    found = {_label(labels, best): (best_s, tuple(int(row) for row in best))}
    tries = 0
    for llms, picks in _exchanges(costs_s, takes, room, spare_s):
        choice = list(map(int, best))
        for llm, pick in zip(llms, picks, strict=True):
            choice[llm] = int(rows[llm][pick])
        label = _label(labels, choice)
        if label in found:
            continue
        if len(found) >= most or tries >= _TRIES_EACH * most:
            break
        tries += 1
        makespans_s, _, _ = retime(_speeds_of(problem, choice))
        value_s = float(problem.group_weights @ makespans_s)
        keeps = (problem.limited @ makespans_s <= problem.limits_s * (1 + 1e-9)).all()
        if keeps and value_s <= best_s + spare_s and problem.accepts(tuple(choice)):
            found[label] = value_s, tuple(choice)
    return sorted(found.values())


Exchanged = tuple[Ints, Ints]
"""Exchanges of two LLMs each, a row per exchange: which LLMs, and which options they take."""


def best_exchange(
    problem: Problem,
    costs_s: Sequence[Floats],
    chosen: Sequence[int],
    near: Sequence[Ints],
    rate: Callable[[Exchanged], Floats],
) -> tuple[float, tuple[int, ...]] | None:
    """The exchange in one or two LLMs that `rate` finds best, and its rating; None where none keeps the budgets.

    `near` are the options of each LLM that are considered; those exchanges are rated that change the sum of `costs_s`
    least.
    """
    owner = np.repeat(np.arange(len(near)), [len(one) for one in near])
    row = np.concatenate(near)
    change_s = np.concatenate(
        [cost_s[one] - cost_s[now] for cost_s, one, now in zip(costs_s, near, chosen, strict=True)]
    )
    more = np.concatenate(
        [units[one] - units[now] for units, one, now in zip(problem.units, near, chosen, strict=True)]
    )
    room = problem.budgets - sum(units[now] for units, now in zip(problem.units, chosen, strict=True))
    # An exchange in one LLM is one in which the other takes what it has.
    ones, others = np.nonzero(owner[:, None] < owner[None, :])
    order = np.argsort(change_s[ones] + change_s[others], kind="stable")
    ones, others = ones[order], others[order]
    kept = np.zeros(0, dtype=int)
    for first in range(0, len(ones), _CHUNK):
        part = slice(first, first + _CHUNK)
        kept = np.append(kept, first + np.flatnonzero((more[ones[part]] + more[others[part]] <= room).all(axis=1)))
        if len(kept) >= _MAX_RATED:
            break
    if not len(kept):
        return None
    pairs = np.column_stack([ones[kept[:_MAX_RATED]], others[kept[:_MAX_RATED]]])
    values = rate((owner[pairs], row[pairs]))
    best = pairs[values.argmin()]
    rows = [int(one) for one in chosen]
    for one in best.tolist():
        rows[owner[one]] = int(row[one])
    return float(values.min()), tuple(rows)


def _worth_a_look(cost_s: Floats, areas: Ints, labels: Ints, spare_s: float) -> Ints:
    near = np.flatnonzero(cost_s <= spare_s)
    order = near[np.lexsort((cost_s[near], areas[near], labels[near]))]
    kept = []
    least_s, label = np.inf, -1
    for row, row_label, row_s in zip(order.tolist(), labels[order].tolist(), cost_s[order].tolist(), strict=True):
        if row_label != label:
            least_s, label = np.inf, row_label
        if row_s < least_s:
            kept.append(row)
            least_s = row_s
    found = np.array(kept, dtype=int)
    return found[np.argsort(np.abs(cost_s[found]), kind="stable")[:_MAX_ROWS]]


def _exchanges(
    costs_s: Sequence[Floats], takes: Sequence[Ints], room: Ints, spare_s: float
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of LLMs with a row of each, row 0 being what it has, that fit into the room; the least cost first."""
    pairs = list(combinations(range(len(costs_s)), 2)) or [(0, 0)]
    sums, where = [], []
    for number, (one, other) in enumerate(pairs):
        ones, others = costs_s[one], costs_s[other] if one != other else np.zeros(1)
        more = takes[other] if one != other else np.zeros((1, len(room)), dtype=int)
        both = ones[:, None] + others[None, :]
        fits = (both <= spare_s) & (takes[one][:, None, :] + more[None, :, :] <= room).all(axis=2)
        picked = np.argwhere(fits)
        sums.append(both[fits])
        where.append(np.column_stack([np.full(len(picked), number), picked]))
    order = np.argsort(np.concatenate(sums), kind="stable")
    return [(pairs[number], (pick, other)) for number, pick, other in np.concatenate(where)[order].tolist()]


def _label(labels: Sequence[Ints], rows: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(label[row]) for label, row in zip(labels, rows, strict=True))


def _speeds_of(problem: Problem, rows: Sequence[int]) -> Floats:
    return np.array([speeds[row] for speeds, row in zip(problem.speeds, rows, strict=True)])

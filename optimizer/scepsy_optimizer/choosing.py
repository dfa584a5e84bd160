"""The choice: of the options of each LLM one each, so that the mean latency is least within the cluster's devices.

The true mean makespan is at least every tangent to it (a pipeline). For one tangent the problem is a multiple-choice
knapsack, which is solved exactly; that is all where the critical path does not move. Where it moves, the executions are
put into groups, each group keeps all of its tangents, and the choice that minimises the sum of the groups' largest
tangents is found by branch and bound (`branching.py`), until the bound and the best choice meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.allocation import Floats, Ints, Option, OptionTable, ReplicaKind
from scepsy_optimizer.branching import minimise
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.makespans import Makespans
from scepsy_optimizer.master import Problem
from scepsy_optimizer.neighbours import neighbours
from scepsy_optimizer.requirements import NO_REQUIREMENTS, Requirements, objective_weights
from scepsy_optimizer.room import room_of
from scepsy_optimizer.workload import Workload

_GAP_GOAL = 1e-4
_MAX_GROUPS = 10
_NEAR = 0.05
"""How much slower than the best a candidate may be, as a part of its latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An option for each LLM, and the mean latency that they give together, workflows weighted as required."""

    options: Mapping[str, Option]
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The best candidate, some others to compare by replay, and a proven lower bound on any allocation's latency.

    The others are near it and differ in replicas; one is the best whose LLMs each have replicas of one kind.

    The bound is for what is minimised: the mean latency, workflows weighted as required.
    """

    candidates: tuple[Candidate, ...]
    lower_bound_s: float

    @property
    def options(self) -> Mapping[str, Option]:
        """The options of the best candidate."""
        return self.candidates[0].options

    @property
    def latency_s(self) -> float:
        """The mean latency of the best candidate."""
        return self.candidates[0].latency_s


def choose(
    workload: Workload,
    makespans: Makespans,
    cluster: Cluster,
    tables: Mapping[str, OptionTable],
    *,
    max_units: int | None = None,
    requirements: Requirements = NO_REQUIREMENTS,
    most: int = 1,
) -> Allocation | None:
    """The best option of each LLM from tables that are there already, such as those of a larger budget.

    `makespans` are those of the workload; the rest is as in `search.find_allocation`.
    """
    groups = _group(workload, requirements)
    offered = [tables[llm] for llm in makespans.llms]
    room = room_of(cluster, (kind for table in offered for kind in table.kinds), max_units)

    def is_possible(rows: tuple[int, ...]) -> bool:
        replicas: Counter[ReplicaKind] = Counter()
        for table, row in zip(offered, rows, strict=True):
            replicas.update(dict(zip(table.kinds, table.counts[row].tolist(), strict=True)))
        return room.holds(replicas)

    problem = Problem(
        speeds=[table.speeds for table in offered],
        units=[room.taken(table.kinds, table.counts) for table in offered],
        budgets=room.budgets,
        areas=len(cluster.device_types),
        accepts=is_possible,
        group_weights=groups.weights,
        limited=groups.limited,
        limits_s=groups.limits_s,
        scale_s=workload.latency_s,
    )

    def retime(speeds: Floats) -> tuple[Floats, Floats, Floats]:
        found = makespans.tangents(speeds)
        coefficients: Floats = np.tensordot(groups.members, found.coefficients, 1)
        return groups.members @ found.makespans_s, groups.members @ found.fixed_s, coefficients

    found = minimise(problem, retime, gap=_GAP_GOAL)
    if not found.choices:
        return None
    choices = [found.choices[0]]
    if most > 1:
        labels = [_replicas_alike(table) for table in offered]
        choices = neighbours(problem, retime, choices[0][1], labels, within=_NEAR, most=most)
        alone = _least_of_one_kind(problem, retime, offered)
        if alone is not None and alone[1] not in [rows for _, rows in choices]:
            choices = sorted([*choices[: most - 1], alone])
    candidates = tuple(
        Candidate(
            options={llm: table.option(row) for llm, table, row in zip(makespans.llms, offered, rows, strict=True)},
            latency_s=latency_s,
        )
        for latency_s, rows in choices
    )
    return Allocation(candidates=candidates, lower_bound_s=found.lower_bound_s)


def _least_of_one_kind(
    problem: Problem, retime: Callable[[Floats], tuple[Floats, Floats, Floats]], offered: Sequence[OptionTable]
) -> tuple[float, tuple[int, ...]] | None:
    """The best choice in which no LLM has replicas of different speed; None where there is none.

    A mix of fast and slow replicas is where the closed form is least exact: it takes the calls' shares among them for
    settled, while in truth each call goes where there is room.
    """
    kept = [np.flatnonzero(np.count_nonzero(table.counts, axis=1) == 1) for table in offered]
    if not all(len(rows) for rows in kept):
        return None

    def whole(rows: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(mine[row]) for mine, row in zip(kept, rows, strict=True))

    alone = replace(
        problem,
        speeds=[speeds[rows] for speeds, rows in zip(problem.speeds, kept, strict=True)],
        units=[units[rows] for units, rows in zip(problem.units, kept, strict=True)],
        accepts=lambda rows: problem.accepts(whole(rows)),
    )
    found = minimise(alone, retime, gap=_GAP_GOAL)
    return (found.choices[0][0], whole(found.choices[0][1])) if found.choices else None


def _replicas_alike(table: OptionTable) -> Ints:
    """The same number for options of as many groups of each size and as many fractions, whatever these are."""
    whole = np.array([kind.fraction == 1 for kind in table.kinds])
    shapes = np.column_stack([table.counts[:, whole], table.counts[:, ~whole].sum(axis=1)])
    labels: Ints = np.unique(shapes, axis=0, return_inverse=True)[1].ravel()
    return labels


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Executions in groups, each of one workflow.

    `members[g, e]` is what execution e counts in group g, so that the groups of a workflow add up to its mean makespan;
    `weights[g]` what a group counts in the objective; `limited` has a row for each limit, with its workflow's groups.
    """

    members: Floats
    weights: Floats
    limited: NDArray[np.bool_]
    limits_s: Floats


def _group(workload: Workload, requirements: Requirements) -> _Groups:
    """Several groups for each workflow: the sum of their bounds is tighter than one bound on the whole."""
    objective = np.array(objective_weights(workload, requirements))
    load = np.array(workload.weights)
    by_workflow: dict[str, list[int]] = {}
    for number, timeline in enumerate(workload.timelines):
        by_workflow.setdefault(timeline.workflow, []).append(number)
    each = max(1, _MAX_GROUPS // len(by_workflow))
    names, weights, members = [], [], []
    for workflow, numbers in by_workflow.items():
        mean = load[numbers] / load[numbers].sum()
        for first in range(min(each, len(numbers))):
            row = np.zeros(len(load))
            row[numbers[first::each]] = mean[first::each]
            members.append(row)
            names.append(workflow)
            weights.append(float(objective[numbers].sum()))
    limits_s = requirements.latency_limits_s
    limited = [[name == workflow for name in names] for workflow in limits_s]
    return _Groups(
        members=np.array(members),
        weights=np.array(weights),
        limited=np.array(limited, dtype=bool).reshape(len(limits_s), len(names)),
        limits_s=np.array(list(limits_s.values()), dtype=float),
    )

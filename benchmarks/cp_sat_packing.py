"""CP-SAT on packing groups and fractions into domains, as a process that answers one JSON line with another.

A line has the domains' sizes by node, the number of groups by size, the number of fractions by units, and the units of
a device; the answer says whether all fit, null where that was not decided in time, and how many devices the nodes have
that are in use at least, 0 where that was not proven.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ortools.sat.python import cp_model

LIMIT_S = 10.0


def pack(
    domains: Sequence[Sequence[int]], sizes: Mapping[int, int], parts: Mapping[int, int], units: int
) -> tuple[bool | None, int]:
    """Whether all groups and fractions fit, and the fewest devices of nodes in use, 0 where that was not proven."""
    model = cp_model.CpModel()
    shared: list[cp_model.IntVar] = []
    used: list[cp_model.LinearExpr] = []
    placed: dict[int, list[cp_model.IntVar]] = defaultdict(list)
    for node in domains:
        touched = model.new_bool_var("")
        used.append(sum(node) * touched)
        for devices in node:
            takes = {size: model.new_int_var(0, devices // size, "") for size in sizes}
            opens = model.new_int_var(0, devices, "")
            model.add(sum((size * count for size, count in takes.items()), opens) <= devices * touched)
            shared.append(opens)
            for size, count in takes.items():
                placed[size].append(count)
    for size, count in sizes.items():
        model.add(sum(placed[size]) == count)
    # How many shared devices are filled in each way that is possible.
    patterns = fillings(sorted(parts), units)
    filled = [model.new_int_var(0, sum(map(sum, domains)), "") for _ in patterns]
    model.add(sum(filled) <= sum(shared))
    for index, part in enumerate(sorted(parts)):
        covered = [pattern[index] * count for pattern, count in zip(patterns, filled, strict=True)]
        model.add(sum(covered) >= parts[part])
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = LIMIT_S
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return (False if status == cp_model.INFEASIBLE else None), 0
    model.minimize(sum(used))
    proven = solver.solve(model) == cp_model.OPTIMAL
    return True, round(solver.objective_value) if proven else 0


def fillings(parts: Sequence[int], room: int) -> list[tuple[int, ...]]:
    """Every way to fill one device."""
    if not parts:
        return [()]
    return [
        (count, *rest) for count in range(room // parts[0] + 1) for rest in fillings(parts[1:], room - count * parts[0])
    ]


def main() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        domains, sizes, parts, units = json.loads(line)
        answer = pack(
            domains, {int(size): n for size, n in sizes.items()}, {int(p): n for p, n in parts.items()}, units
        )
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

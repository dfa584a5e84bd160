"""One multiple-choice knapsack for CP-SAT, read from standard input, in a process of its own.

ortools carries a HiGHS of its own, which does not load beside the highspy that the search uses. Its costs are whole
numbers, so they come scaled.
"""

from __future__ import annotations

import json
import sys
import time

from ortools.sat.python import cp_model


def main() -> int:
    """Read `sizes` and `prices` (a list per table), `budget` and `limit_s`; print `picks` (or null) and `elapsed_s`."""
    order = json.load(sys.stdin)
    model = cp_model.CpModel()
    picks = [[model.new_bool_var("") for _ in table] for table in order["sizes"]]
    for pick in picks:
        model.add_exactly_one(pick)
    flat = [one for pick in picks for one in pick]
    sizes = [size for table in order["sizes"] for size in table]
    prices = [price for table in order["prices"] for price in table]
    model.add(cp_model.LinearExpr.weighted_sum(flat, sizes) <= order["budget"])
    model.minimize(cp_model.LinearExpr.weighted_sum(flat, prices))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = order["limit_s"]
    solver.parameters.num_workers = 2
    started_s = time.perf_counter()
    status = solver.solve(model)
    elapsed_s = time.perf_counter() - started_s
    found = None
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = [next(row for row, one in enumerate(pick) if solver.value(one)) for pick in picks]
    print(json.dumps({"picks": found, "elapsed_s": elapsed_s}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

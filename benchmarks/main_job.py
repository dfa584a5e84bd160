"""The main job on emulated devices: predicted beside measured latency, before beside after.

Runs the demonstration several times with other questions and arrivals, at a light and at a higher load. Measured is
what the capture saw of real frameworks and real HTTP against emulators whose timing follows the H100 estimates; so
this checks the loop and the prediction's queueing, not the estimates themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.outcome import Bound, finish

CASES = (
    {"cluster": "4xH100", "rate": 2.0, "seed": 1},
    {"cluster": "4xH100", "rate": 4.0, "seed": 2},
    {"cluster": "8xH100", "rate": 3.0, "seed": 3},
)
SECONDS = 30


def main() -> int:
    """Run every case, print, judge."""
    print(
        f"{'cluster':>8} {'rate/s':>6} {'runs':>5} {'even s':>7} {'plan s':>7} {'gain':>6} "
        f"{'error even':>11} {'error plan':>11}"
    )
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.json"
            subprocess.run(
                [
                    *(sys.executable, "-m", "scepsy", "demo"),
                    *("--cluster", str(case["cluster"])),
                    *("--rate", str(case["rate"])),
                    *("--seed", str(case["seed"])),
                    *("--seconds", str(SECONDS)),
                    *("--directory", f"{folder}/run"),
                    *("--json", str(figures)),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            row = case | json.loads(figures.read_text())
        rows.append(row)
        print(
            f"{row['cluster']:>8} {row['rate']:>6} {row['executions']:>5} {row['before_s']:>7.2f} "
            f"{row['after_s']:>7.2f} {row['speed_up']:>5.2f}x {row['error_before']:>11.1%} {row['error_after']:>11.1%}"
        )
    errors = [row[key] for row in rows for key in ("error_before", "error_after")]
    bounds = [
        Bound(name="mean error of the predicted workflow latency", value=sum(errors) / len(errors), at_most=0.15),
        Bound(name="worst case's error", value=max(errors), at_most=0.15),
        Bound(
            name="least gain of the plan over the even split", value=min(row["speed_up"] for row in rows), at_least=1
        ),
        Bound(name="failed executions", value=sum(row["failed"] for row in rows), at_most=0),
    ]
    return finish("main_job", bounds, {"cases": rows})


if __name__ == "__main__":
    sys.exit(main())

"""Who tells the truth: small programs on the real frameworks, each judged by what the server behind them saw.

Scepsy and the other instrumentations run the same programs in a process of their own each; then Scepsy runs beside each
of the others in one process. A tick, or what was told wrongly. The programs are in `truth_cases`, those for two
instrumentations at once in `truth_beside`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from typing import Final

from benchmarks import rivals
from benchmarks.outcome import Bound, finish

OURS: Final = "scepsy-sdk"
OTHERS: Final = ("openinference", "genai", "traceloop")
BESIDE: Final = ("own destinations", "one provider")
"""The cases of `truth_beside`, each in a process of its own: not everybody can be turned on again."""


def _worker(name: str, beside: str) -> None:
    from benchmarks import truth_beside, truth_cases
    from benchmarks.truth_stage import Stage

    at = Stage()
    if beside:
        verdicts = {beside: asyncio.run(truth_beside.run(at, name, beside))}
    else:
        with tempfile.TemporaryDirectory() as directory:
            rivals.turn_on(name, at.provider, directory)
            verdicts = asyncio.run(truth_cases.run_all(at))
    print(json.dumps(verdicts), flush=True)
    os._exit(0)  # whatever threads others have left behind


def main() -> int:
    """Run all, print the table, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ours", action="store_true", help="run Scepsy alone and beside the others, not the others alone"
    )
    judged = (OURS,) if parser.parse_args().ours else (OURS, *OTHERS)
    rivals.prepare()
    columns = {name: rivals.run_worker("benchmarks.capture_truth", name) for name in judged}
    titles = {**rivals.NAMES, OURS: rivals.NAMES["scepsy"]}
    print(f"{'':<38}" + "".join(f"{titles[name]:<36}" for name in columns))
    for case in columns[OURS]:
        cells = "".join(f"{told[case] or '✓':<36}" for told in columns.values())
        print(f"{case:<38}{cells}".rstrip())
    print()
    beside = {
        name: {case: rivals.run_worker("benchmarks.capture_truth", name, case)[case] for case in BESIDE}
        for name in OTHERS
    }
    print(f"{'Scepsy beside':<38}" + "".join(f"{titles[name]:<36}" for name in beside))
    for case in BESIDE:
        cells = "".join(f"{told[case] or '✓':<36}" for told in beside.values())
        print(f"{case:<38}{cells}".rstrip())
    wrong = {name: sum(map(bool, told.values())) for name, told in columns.items()}
    count = len(columns[OURS])
    print("\nwrong of " + f"{count}: " + ", ".join(f"{titles[name]} {number}" for name, number in wrong.items()))
    bounds = [
        Bound(name="cases that Scepsy gets wrong", value=wrong[OURS], at_most=0),
        Bound(
            name="cases that go wrong beside others",
            value=sum(bool(verdict) for told in beside.values() for verdict in told.values()),
            at_most=0,
        ),
    ]
    return finish("capture_truth", bounds, {"verdicts": columns, "beside": beside})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2], "".join(sys.argv[3:]))
    else:
        raise SystemExit(main())

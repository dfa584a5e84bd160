"""What is in sets of real traces: executions, calls, what was left out and why, and how much latency and shares vary.

`python -m benchmarks.read_real [PATH ...]`: each PATH is one set (a file, or a directory of them). Without any it reads
the small parts of published sets that the tests use. Bound: no call is left out of an export or a table of calls.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.outcome import Bound, finish
from scepsy.traces import read_executions
from scepsy_optimizer.workload import aggregate

DATA = Path(__file__).parents[1] / "tests" / "data"
SETS = (DATA / "claude-code", DATA / "langfuse", DATA / "golden" / "openinference.jsonl")


def show(path: Path) -> Mapping[str, float]:
    """Print one set; returns its figures."""
    reading = read_executions([path])
    workload = aggregate(reading.executions)
    calls = sum(len(execution.calls) for execution in reading.executions)
    print(f"\n{path.relative_to(DATA) if path.is_relative_to(DATA) else path}")
    print(f"  {len(reading.executions)} executions, {calls} calls, {reading.spans} spans in {reading.files} file(s)")
    for what, found in (("left out", reading.dropped), ("mended", reading.repaired)):
        for reason, count in found.items():
            print(f"  {what}: {count} {reason}")
    print(f"  latency: mean {workload.latency_s:.1f} s, coefficient of variation {workload.latency_cv:.2f}")
    for demand in workload.demands:
        print(
            f"  share of {demand.llm:<30} {demand.share:6.1%} ({demand.share_low:.1%} to {demand.share_high:.1%}), "
            f"coefficient of variation {demand.share_cv:.2f}"
        )
    return {
        "executions": len(reading.executions),
        "calls": calls,
        "left_out": sum(reading.dropped.values()),
        "latency_cv": workload.latency_cv,
        **{f"share_cv of {demand.llm}": demand.share_cv for demand in workload.demands},
    }


def main(paths: list[str]) -> int:
    """Print every set; 1 if a bound is missed."""
    figures = {str(path): show(path) for path in (map(Path, paths) if paths else SETS)}
    bounds = [
        Bound(name=f"left out of {Path(path).name}", value=found["left_out"], at_most=0)
        for path, found in figures.items()
        if not path.endswith("openinference.jsonl")  # one call of that program fails on purpose
    ]
    return finish("read_real", bounds, {Path(path).name: found for path, found in figures.items()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

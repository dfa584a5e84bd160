"""`scepsy demo`: the whole loop on emulated devices, in under three minutes."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from rich.console import Console

HELP = "trace three example workflows on emulated GPUs, plan, deploy the plan, compare"

EXAMPLE = """\
  scepsy demo                                         # four emulated H100s, under three minutes
  scepsy demo --cluster 8xH100 --rate 4 --seconds 20"""

EXAMPLES = ("beam_search", "retrieval", "research")
NEEDED = ("aiohttp", "langchain_openai", "llama_index", "openai", "orjson", "prometheus_client", "psutil")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--cluster", default="4xH100", help="emulated cluster (default: 4xH100)")
    parser.add_argument("--rate", type=float, default=2.0, help="executions per second (default: 2)")
    parser.add_argument("--seconds", type=float, default=45.0, help="how long each round sends load (default: 45)")
    parser.add_argument("--seed", type=int, default=1, help="of questions and arrivals (default: 1)")
    parser.add_argument("--examples", type=Path, help="folder of the example workflows (default: the shipped ones)")
    parser.add_argument("--directory", type=Path, help="where traces and plan go (default: runs/demo-TIME)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the closing figures there as well")


def run(args: argparse.Namespace, console: Console) -> int:
    """Play the story, show it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ScepsyError(f"{', '.join(missing)} missing: pip install 'scepsy[demo]'")

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from scepsy.demo.drive import Outcome
    from scepsy.demo.schedule import make_schedule
    from scepsy.demo.story import Stage, tell
    from scepsy.report.tables import plain_table, plan_table, workload_table

    if not (args.rate > 0 and args.seconds > 0):
        raise ScepsyError("--rate and --seconds must be positive")
    folder = args.examples or _shipped_examples()
    if args.directory is not None and args.directory.exists() and any(args.directory.iterdir()):
        raise ScepsyError(f"{args.directory} is not empty; name a new folder, so that no other traces get mixed in")
    for name in EXAMPLES:
        if not (folder / f"{name}.py").is_file():
            raise ScepsyError(f"--examples {folder}: there is no {name}.py in it; leave it out for the shipped ones")
    directory = args.directory or Path("runs") / f"demo-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    stage = Stage(
        examples={name: folder / f"{name}.py" for name in EXAMPLES},
        schedule=make_schedule(EXAMPLES, rate_rps=args.rate, seconds=args.seconds, seed=args.seed),
        cluster=args.cluster,
        rate_rps=args.rate,
        directory=directory,
    )
    total = sum(len(arrivals.at_s) for arrivals in stage.schedule.values())
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:

        def on_round(title: str) -> Callable[[Outcome], None]:
            task = progress.add_task(f"{title}: executions", total=total)
            return lambda _outcome: progress.advance(task)

        story = tell(
            stage,
            on_event=lambda text: progress.console.print(text, soft_wrap=True, markup=False, highlight=False),
            on_round=on_round,
            on_workload=lambda workload: progress.console.print(workload_table(workload)),
            on_plan=lambda plan: progress.console.print(plan_table(plan)),
        )
    table = plain_table("mean latency in seconds")
    table.add_column("workflow")
    for column in ("even split\npredicted", "\nmeasured", "plan\npredicted", "\nmeasured", "\nspeed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [*story.after.measured_s]
    for workflow in rows:
        before, after = story.before.measured_s.get(workflow, float("nan")), story.after.measured_s[workflow]
        table.add_row(
            workflow,
            f"{story.before.predicted_s.get(workflow, float('nan')):.2f}",
            f"{before:.2f}",
            f"{story.after.predicted_s.get(workflow, float('nan')):.2f}",
            f"{after:.2f}",
            f"{before / after:.2f}x",
        )
    before, after = story.before.workload.latency_s, story.after.workload.latency_s
    assert story.before.plan.prediction is not None  # noqa: S101 - both plans were predicted
    assert story.after.plan.prediction is not None  # noqa: S101
    table.add_section()
    table.add_row(
        "all",
        f"{story.before.plan.prediction.latency_s:.2f}",
        f"{before:.2f}",
        f"{story.after.plan.prediction.latency_s:.2f}",
        f"{after:.2f}",
        f"{before / after:.2f}x",
    )
    console.print(table)
    console.print(
        f"Highest rate within the planned load: {story.before.plan.prediction.max_rate_rps:.2f}/s by the even split, "
        f"{story.after.plan.prediction.max_rate_rps:.2f}/s by the plan. "
        f"Mean error of the prediction: {story.before.error:.0%} and {story.after.error:.0%}.",
        soft_wrap=True,
    )
    failed = story.before.failed + story.after.failed
    if failed:
        console.print(f"{failed} executions failed; see {directory}/*.log")
    console.print(f"\nNext: scepsy optimize {story.before.traces} --cluster 8xH100 --rate 4", soft_wrap=True)
    if args.json is not None:
        figures = {
            "executions": story.after.workload.executions,
            "failed": failed,
            "before_s": before,
            "after_s": after,
            "speed_up": before / after,
            "error_before": story.before.error,
            "error_after": story.after.error,
            "gap": story.after.plan.prediction.gap,
        }
        args.json.write_text(json.dumps(figures), encoding="utf-8")
    return 1 if failed else 0


def _shipped_examples() -> Path:
    """The examples of this installation: beside the sources in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_examples", package.parent.parent / "examples"):
        if (folder / f"{EXAMPLES[0]}.py").exists():
            return folder
    raise ScepsyError("the example workflows are not in this installation; name their folder with --examples")

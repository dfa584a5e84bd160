"""The story of the demonstration: run by an even split, trace, plan, run by the plan, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scepsy.demo.drive import Outcome, drive
from scepsy.demo.schedule import Arrivals
from scepsy.deployment import deploy
from scepsy.files import save_plan
from scepsy.inputs import provenance, resolve_cluster, resolve_profiles
from scepsy.traces import read_executions
from scepsy_optimizer.baselines import even_split
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import hand_made_plan, optimize, predict
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.workload import Workload, aggregate

LLMS = ("generator", "verifier", "reranker", "writer")
"""What the examples call, in the order in which an even split deals out left-over devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One round of the load: its plan with the prediction for it, and what was traced."""

    plan: Plan
    workload: Workload
    traces: Path
    failed: int

    @property
    def measured_s(self) -> Mapping[str, float]:
        """Mean traced latency of each workflow."""
        sums: dict[str, float] = dict.fromkeys(self.workload.workflows, 0.0)
        for timeline in self.workload.timelines:
            sums[timeline.workflow] += timeline.makespan_s(timeline.traced_s)
        return {workflow: total / self.workload.workflows[workflow] for workflow, total in sums.items()}

    @property
    def predicted_s(self) -> Mapping[str, float]:
        """Mean predicted latency of each workflow."""
        return {} if self.plan.prediction is None else self.plan.prediction.workflow_latency_s

    @property
    def error(self) -> float:
        """Predicted against measured latency, mean of the workflows' absolute relative errors."""
        measured = self.measured_s
        errors = [abs(self.predicted_s[workflow] / measured[workflow] - 1) for workflow in measured]
        return sum(errors) / len(errors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Both rounds."""

    before: Run
    after: Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Where the demonstration takes place: the examples, what is asked of them, and where its files go."""

    examples: Mapping[str, Path]
    schedule: Mapping[str, Arrivals]
    cluster: str
    rate_rps: float
    directory: Path


def tell(
    stage: Stage,
    *,
    on_event: Callable[[str], None],
    on_round: Callable[[str], Callable[[Outcome], None]],
    on_workload: Callable[[Workload], None],
    on_plan: Callable[[Plan], None],
) -> Story:
    """Play both rounds. `on_round` is called with a title before each and returns what to call for each execution.

    Raises ScepsyError; nothing is left running.
    """
    cluster = resolve_cluster(stage.cluster)
    profiles = resolve_profiles(LLMS, cluster.device_type)
    even = even_split(LLMS, profiles, devices=cluster.devices, max_tensor_parallel_size=cluster.largest_domain)
    before_plan = hand_made_plan(even, profiles, cluster)
    on_event("Round one: every LLM gets the same number of devices, as people do by hand")
    before, failed = _play(stage, before_plan, profiles, "even", on_event, on_round("even split"))
    on_workload(before)
    # What the executions never call gets no devices from the plan, and none in the prediction of the first round.
    used = {demand.llm: even[demand.llm] for demand in before.demands}
    first = Run(
        plan=predict(before, profiles, cluster, used, rate_rps=stage.rate_rps),
        workload=before,
        traces=stage.directory / "even",
        failed=failed,
    )
    sources = provenance(profiles, stage.directory / "even")
    plan = optimize(before, profiles, cluster, rate_rps=stage.rate_rps, provenance=sources, replay_seed=0)
    save_plan(plan, stage.directory / "plan.yaml")
    on_plan(plan)
    on_event("Round two: the same load on the plan")
    after, failed = _play(stage, plan, profiles, "planned", on_event, on_round("plan"))
    second = Run(plan=plan, workload=after, traces=stage.directory / "planned", failed=failed)
    return Story(before=first, after=second)


def _play(
    stage: Stage,
    plan: Plan,
    profiles: Mapping[str, LLMProfile],
    name: str,
    on_event: Callable[[str], None],
    on_outcome: Callable[[Outcome], None],
) -> tuple[Workload, int]:
    """One round: start the plan's emulators, send the load, stop, read the traces; also counts failed executions."""
    traces = stage.directory / name
    traces.mkdir(parents=True, exist_ok=True)
    log = stage.directory / f"{name}.log"
    with deploy(plan, engine="emulator", profiles=profiles, port=0, name=f"demo-{name}", on_event=on_event) as running:
        outcomes = drive(
            stage.examples,
            stage.schedule,
            base_url=running.url,
            traces=traces,
            log=log,
            on_outcome=on_outcome,
        )
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if len(failed) == len(outcomes):
        reason = failed[0].error if failed else "no execution was started"
        raise ScepsyError(f"demo: every execution failed in round {name!r}: {reason}; see {log}")
    return aggregate(read_executions([traces]).executions), len(failed)

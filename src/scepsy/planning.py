"""The main job in calls: traces to workload, workload to plan, plan to running engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scepsy.files import load_requirements
from scepsy.inputs import ProfileSources, Traces, provenance, resolve_cluster, resolve_cluster_profiles
from scepsy.traces import Tally, iter_executions
from scepsy.traces.assemble import CACHED_CALL, FAILED_CALL, NAMELESS_CALL, STOPPED_CALL, UNENDED_CALL, fill_in
from scepsy_optimizer.allocation import MAX_UTILISATION
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.frontier import FrontierPoint, find_frontier
from scepsy_optimizer.infeasible import NO_LOAD_RPS, explain_no_plan
from scepsy_optimizer.judging import with_replay
from scepsy_optimizer.next_device import NextDevice, next_device
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import keep_in_place
from scepsy_optimizer.planner import optimize as optimize_workload
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.questions import optimize_devices, optimize_rate
from scepsy_optimizer.requirements import NO_REQUIREMENTS, Requirements, require_known
from scepsy_optimizer.robust import Robustness, plan_robustly
from scepsy_optimizer.sharing import WorkflowShare, share_plan
from scepsy_optimizer.totals import Totals, total
from scepsy_optimizer.totals_workload import workload_of
from scepsy_optimizer.what_if import WhatIf, add_device
from scepsy_optimizer.what_if import what_if as ask_what_if
from scepsy_optimizer.workload import Workload

if TYPE_CHECKING:
    from scepsy.deployment import Deployment

Rate = float | Literal["max"] | Mapping[str, float]
"""Executions per second: of all workflows as traced, of each by its name, or as many as the cluster carries."""

_SEED = 0

_LOST_CALLS = (FAILED_CALL, STOPPED_CALL, CACHED_CALL, UNENDED_CALL, NAMELESS_CALL)


def aggregate(
    traces: Traces, *, rates: Mapping[str, float] | None = None, on_progress: Callable[[float], None] | None = None
) -> Workload:
    """Read trace files, or directories of them, and aggregate their executions.

    With `rates`, executions per second by workflow, each workflow counts by its rate rather than by how often it was
    traced. `on_progress` is told the part of the traces that is read. Raises ScepsyError.
    """
    return workload_of(read_to_plan(traces, Tally(), on_progress), rates_rps=rates)


def optimize(
    traces: Traces | Workload,
    *,
    cluster: str | Path | Cluster,
    rate: Rate | None = None,
    max_latency_s: float | None = None,
    percentile: int | None = None,
    requirements: Requirements | str | Path | None = None,
    robust: float | None = None,
    profiles: ProfileSources | None = None,
    models: Mapping[str, str] | None = None,
    max_utilisation: float = MAX_UTILISATION,
) -> Plan:
    """The plan of least mean latency for `rate` executions per second.

    With a `max_latency_s` as well, the plan that takes the fewest devices for both; with only that, or with the rate
    "max", the plan for the highest rate (within it). The limit is on the mean, or on the `percentile` (50, 95 or 99) of
    a replay. The rate is of all traced workflows as they were mixed, or, given as a mapping, of each workflow by its
    name.

    `requirements` (or a file of them) keep LLMs as they are, limit what they get, and give workflows weights and
    latency limits. With `robust`, a quantile such as 0.9, every LLM's load is taken at that quantile of what the traces
    leave open, instead of at their mean.

    `cluster` is a short form such as "8xH100", a cluster file, or a `Cluster`. `profiles` are profile files, a
    directory of them, or a mapping by LLM name; LLMs without one are estimated from `models` (LLM name to Hugging Face
    id or directory), or taken from the profiles that ship with Scepsy. Raises ScepsyError.
    """
    question = prepare(
        traces,
        cluster=cluster,
        rate=rate,
        requirements=requirements,
        profiles=profiles,
        models=models,
        max_utilisation=max_utilisation,
    )
    return answer(question, max_latency_s=max_latency_s, percentile=percentile, robust=robust).plan


def frontier(
    traces: Traces | Workload,
    *,
    cluster: str | Path | Cluster,
    requirements: Requirements | str | Path | None = None,
    profiles: ProfileSources | None = None,
    models: Mapping[str, str] | None = None,
    max_utilisation: float = MAX_UTILISATION,
) -> tuple[FrontierPoint, ...]:
    """Which mean latencies, rates and numbers of devices can be had together: the points that no other beats.

    What is taken is told under `optimize`. Raises ScepsyError.
    """
    question = prepare(
        traces,
        cluster=cluster,
        requirements=requirements,
        profiles=profiles,
        models=models,
        max_utilisation=max_utilisation,
    )
    return trace_frontier(question)


def optimize_and_deploy(
    traces: Traces | Workload,
    *,
    cluster: str | Path | Cluster,
    rate: Rate | None = None,
    max_latency_s: float | None = None,
    percentile: int | None = None,
    requirements: Requirements | str | Path | None = None,
    robust: float | None = None,
    profiles: ProfileSources | None = None,
    models: Mapping[str, str] | None = None,
    **deploy_options: Any,
) -> Deployment:
    """Plan for the traces and start the plan's engines behind one endpoint.

    `deploy_options` go to `scepsy.deploy` (engine, host, port, name, command, ...). The deployment's `url` is what the
    workflow's clients take as their base URL. Raises ScepsyError.
    """
    from scepsy.deployment import deploy

    question = prepare(traces, cluster=cluster, rate=rate, requirements=requirements, profiles=profiles, models=models)
    plan = answer(question, max_latency_s=max_latency_s, percentile=percentile, robust=robust).plan
    return deploy(plan, profiles=question.profiles, **deploy_options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What plans are asked of: `optimize`'s arguments, read and resolved.

    `alone` has the workload of each workflow by itself, where several were read from traces, and `account` says what
    was left out and mended then.
    """

    workload: Workload
    profiles: Profiles
    cluster: Cluster
    rate: float | Literal["max"] | None = None
    requirements: Requirements = NO_REQUIREMENTS
    max_utilisation: float = MAX_UTILISATION
    provenance: Mapping[str, str] = field(default_factory=dict)
    alone: Mapping[str, Workload] = field(default_factory=dict)
    account: Tally | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A plan and what is to be said about it.

    `robustness` where a quantile was asked for, `shares` where several workflows share the plan, `changes` (one device
    more or less) and `next_devices` (one device more for an LLM) where that was asked about.
    """

    plan: Plan
    robustness: Robustness | None = None
    shares: tuple[WorkflowShare, ...] = ()
    changes: tuple[WhatIf, ...] = ()
    next_devices: tuple[NextDevice, ...] = ()


def prepare(
    traces: Traces | Workload,
    *,
    cluster: str | Path | Cluster,
    rate: Rate | None = None,
    requirements: Requirements | str | Path | None = None,
    profiles: ProfileSources | None = None,
    models: Mapping[str, str] | None = None,
    max_utilisation: float = MAX_UTILISATION,
    on_progress: Callable[[float], None] | None = None,
) -> Question:
    """Read and resolve what a question is asked of; `on_progress` is told the part of the traces that is read.

    Raises ScepsyError.
    """
    resolved = resolve_cluster(cluster)
    if isinstance(requirements, str | Path):
        requirements = load_requirements(requirements)
    rates = rate if isinstance(rate, Mapping) else None
    if rates is not None and isinstance(traces, Workload):
        raise ScepsyError("rates by workflow belong to the aggregation: give them to aggregate, and their sum here")
    alone, account = {}, None
    if isinstance(traces, Workload):
        workload = traces
    else:
        account = Tally()
        totals = read_to_plan(traces, account, on_progress)
        workload = workload_of(totals, rates_rps=rates)
        alone = _by_workflow(totals)
    found = resolve_cluster_profiles(
        [demand.llm for demand in workload.demands], resolved, profiles=profiles, models=models
    )
    required = requirements or NO_REQUIREMENTS
    require_known(required, workload, resolved)
    return Question(
        workload=workload,
        profiles=found,
        cluster=resolved,
        rate=sum(rate.values()) if isinstance(rate, Mapping) else rate,
        requirements=required,
        max_utilisation=max_utilisation,
        provenance=provenance(found, None if isinstance(traces, Workload) else traces),
        alone=alone,
        account=account,
    )


def answer(
    question: Question,
    *,
    max_latency_s: float | None = None,
    percentile: int | None = None,
    robust: float | None = None,
    what_if: bool = False,
    old: Plan | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Answer:
    """The plan that a question asks for, and what is to be said about it.

    What an `old` plan has already stays on its devices, as far as the allocation leaves it. Where there is a latency
    limit, `on_progress` is told the part of the search that is done. Raises ScepsyError.
    """
    ask = _asking(question, max_latency_s, percentile, on_progress)
    robustness = None
    if robust is None:
        plan = ask(question.workload)
    else:
        if percentile is not None:
            raise ScepsyError("a robust plan is for the mean latency: leave out the percentile")
        plan, robustness = plan_robustly(
            ask, question.workload, question.profiles, quantile=robust, rng=np.random.default_rng(_SEED)
        )
        plan = with_replay(plan, question.profiles, question.workload, _SEED)
        plan = replace(plan, provenance={**plan.provenance, "robust": f"loads at the {robust:g} quantile"})
    if old is not None:
        plan = keep_in_place(plan, old, question.requirements)
    common = {"max_utilisation": question.max_utilisation}
    return Answer(
        plan=plan,
        robustness=robustness,
        shares=share_plan(plan, question.workload, question.alone, question.profiles, **common)
        if len(question.alone) > 1
        else (),
        changes=ask_what_if(question.workload, question.profiles, plan, requirements=question.requirements, **common)
        if what_if
        else (),
        next_devices=next_device(
            question.workload, question.profiles, plan, requirements=question.requirements, **common
        )
        if what_if
        else (),
    )


def trace_frontier(
    question: Question, on_progress: Callable[[int, int], None] | None = None
) -> tuple[FrontierPoint, ...]:
    """The frontier of a question's workload and cluster; its rate does not matter. ScepsyError if empty."""
    points = find_frontier(
        question.workload,
        question.profiles,
        question.cluster,
        max_utilisation=question.max_utilisation,
        requirements=question.requirements,
        on_progress=on_progress,
    )
    if not points:
        raise ScepsyError(
            explain_no_plan(
                question.workload,
                question.profiles,
                question.cluster,
                rate_rps=NO_LOAD_RPS,
                max_utilisation=question.max_utilisation,
                requirements=question.requirements,
            )
        )
    return points


def explore(
    question: Question, plan: Plan, on_progress: Callable[[int, int], None] | None = None
) -> tuple[FrontierPoint, ...]:
    """The frontier around a plan: at its rate and number of devices as well, and with up to half as many again.

    More devices are tried only where they are all of one type. Raises ScepsyError.
    """
    cluster = question.cluster
    if len(cluster.device_types) == 1:
        for _ in range(max(2, cluster.devices // 2)):
            cluster = add_device(cluster, cluster.device_type)
    return find_frontier(
        question.workload,
        question.profiles,
        cluster,
        more_rates_rps=(plan.rate_rps,),
        more_devices=(question.cluster.devices,),
        max_utilisation=question.max_utilisation,
        requirements=question.requirements,
        on_progress=on_progress,
    )


def _asking(
    question: Question,
    max_latency_s: float | None,
    percentile: int | None,
    on_progress: Callable[[float], None] | None,
) -> Callable[[Workload], Plan]:
    """The function that answers the question for a workload."""
    rate = question.rate
    common: dict[str, Any] = {
        "max_utilisation": question.max_utilisation,
        "requirements": question.requirements,
        "provenance": question.provenance,
        "replay_seed": _SEED,
    }
    limit: dict[str, Any] = {"latency_s": max_latency_s, "percentile": percentile, "on_progress": on_progress}
    if rate is None and max_latency_s is None:
        raise ScepsyError("nothing to plan for: give a rate, a latency limit, or both")
    if rate is None or rate == "max":
        return lambda workload: optimize_rate(workload, question.profiles, question.cluster, **limit, **common)
    if max_latency_s is None:
        if percentile is not None:
            raise ScepsyError("a percentile belongs to a latency limit: give that as well")
        return lambda workload: optimize_workload(
            workload, question.profiles, question.cluster, rate_rps=rate, **common
        )
    return lambda workload: optimize_devices(
        workload, question.profiles, question.cluster, rate_rps=rate, **limit, **common
    )


def read_totals(traces: Traces, tally: Tally, on_progress: Callable[[float], None] | None = None) -> Totals:
    """What the traced executions add up to, with the mean where calls lack token counts; `tally` is complete then.

    Raises ScepsyError for traces that cannot be read, and where no call of an LLM is left.
    """
    paths = _paths(traces)
    totals = total(fill_in(iter_executions(paths, tally, on_progress=on_progress), tally))
    lost = ", ".join(f"{tally.dropped[reason]:,} {reason}" for reason in _LOST_CALLS if tally.dropped[reason])
    if lost and not totals.llms:
        raise ScepsyError(
            f"{', '.join(map(str, paths))}: the {totals.executions:,} executions have no LLM call that counts; left "
            f"out: {lost}; trace executions whose calls are answered"
        )
    return totals


def describe_account(tally: Tally) -> str:
    """What was left out and mended while reading, in one line; empty where that is nothing."""
    told = []
    for words, reasons in (("left out", tally.dropped), ("mended", tally.repaired)):
        found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common() if count)
        told += [f"{words}: {found}"] if found else []
    return "; ".join(told)


def read_to_plan(traces: Traces, tally: Tally, on_progress: Callable[[float], None] | None) -> Totals:
    """The totals of traces that a plan can be made from. Raises ScepsyError where an LLM has no token counts at all."""
    totals = read_totals(traces, tally, on_progress)
    counted = {llm for (llm, _), counts in tally.counts.items() if counts.inputs}
    if uncounted := [llm for llm in totals.llms if llm not in counted]:
        raise ScepsyError(
            f"{', '.join(map(str, _paths(traces)))}: no call of {', '.join(uncounted)} tells its token counts, which a "
            "plan needs: trace again, and for streams ask for them with scepsy.instrument(include_usage=True) or "
            'stream_options={"include_usage": True}'
        )
    return totals


def _paths(traces: Traces) -> list[str | Path]:
    return [traces] if isinstance(traces, str | Path) else list(traces)


def _by_workflow(totals: Totals) -> dict[str, Workload]:
    """The workload of each workflow by itself, of those that call any LLM; nothing where there is only one."""
    parts = {name: Totals(workflows={name: flow}, limits=totals.limits) for name, flow in totals.workflows.items()}
    return {name: workload_of(part) for name, part in parts.items() if part.llms} if len(parts) > 1 else {}

"""From totals to a workload: exact means of all executions, and the sample for what needs whole executions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.sampling import RESAMPLES
from scepsy_optimizer.timeline import compile_timeline
from scepsy_optimizer.totals import FlowTotals, Peak, Sum, Totals
from scepsy_optimizer.workload import LLMDemand, Workload, aggregate, weights_of_workflows


def workload_of(totals: Totals, *, rates_rps: Mapping[str, float] | None = None) -> Workload:
    """The workload of the executions that were added up; LLMs come in the order of falling share.

    Where the samples hold every execution it is what `aggregate` makes of them. Where they do not, everything but the
    `timelines` is of all executions; each timeline counts for its part of its workflow, and the intervals of shares are
    from the resamples of the totals. `rates_rps` as in `aggregate`. Raises ScepsyError as `aggregate` does.
    """
    if totals.complete:
        return aggregate(totals.sampled, rates_rps=rates_rps)
    if not totals.llms:
        raise ScepsyError(
            f"none of the {totals.executions} executions calls an LLM: is the capture of calls turned on?"
        )
    counts = {name: flow.sum(Sum.EXECUTIONS) for name, flow in totals.workflows.items()}
    mixture = _Mixture(totals, weights_of_workflows(counts, rates_rps))
    runs = totals.sampled
    of_sample = {name: len(flow.sample.chosen) for name, flow in totals.workflows.items()}
    weights = [mixture.weights[run.workflow] * counts[run.workflow] / of_sample[run.workflow] for run in runs]
    shares = mixture.shares()
    demands = [mixture.demand(llm, shares[llm]) for llm in totals.llms]
    return Workload(
        workflows=counts,
        latency_s=mixture.mean(Sum.MAKESPAN_NS) / 1e9,
        latency_cv=mixture.cv(Sum.MAKESPAN_NS, Sum.MAKESPAN_NS_SQUARED, Sum.EXECUTIONS),
        tool_s=mixture.mean(Sum.FIXED_NS) / 1e9,
        demands=tuple(sorted(demands, key=lambda demand: (-demand.share, demand.llm))),
        timelines=tuple(compile_timeline(run) for run in runs),
        weights=tuple(weights),
    )


class _Mixture:
    """Totals of several workflows of which each execution counts by its workflow's weight; all together 1."""

    def __init__(self, totals: Totals, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self._flows: list[tuple[FlowTotals, float]] = [(flow, weights[name]) for name, flow in totals.workflows.items()]
        self._llms = totals.llms

    def mean(self, what: Sum, *names: str) -> float:
        """The weighted sum over all executions, which is the mean over executions."""
        return sum(weight * flow.sum(what, *names) for flow, weight in self._flows)

    def cv(self, what: Sum, squared: Sum, count: Sum, *names: str, count_names: tuple[str, ...] = ()) -> float:
        """Coefficient of variation of what was added up, among as many as `count` says; as in `aggregate`."""
        number = sum(flow.sum(count, *count_names) for flow, _ in self._flows)
        together = self.mean(count, *count_names)
        if number < 2 or together <= 0:
            return 0.0
        mean = self.mean(what, *names) / together
        if mean <= 0:
            return 0.0
        variance = self.mean(squared, *names) / together - mean**2
        return math.sqrt(max(0.0, variance) * number / (number - 1)) / mean

    def shares(self) -> Mapping[str, tuple[float, float, float]]:
        """The share of each LLM with its 95 % bootstrap interval."""
        nothing = (0,) * RESAMPLES
        resampled = {
            llm: sum(weight * np.array(flow.resampled.get(llm, nothing), dtype=float) for flow, weight in self._flows)
            for llm in self._llms
        }
        together = sum(resampled.values())
        service = {llm: self.mean(Sum.SERVICE_NS, llm) for llm in self._llms}
        spent = sum(service.values())
        found = {}
        for llm in self._llms:
            parts = np.divide(resampled[llm], together, out=np.zeros(RESAMPLES), where=np.asarray(together) > 0)
            low, high = np.quantile(parts, [0.025, 0.975]).tolist()
            found[llm] = (service[llm] / spent if spent > 0 else 0.0, low, high)
        return found

    def demand(self, llm: str, share: tuple[float, float, float]) -> LLMDemand:
        """What all executions ask of one LLM."""
        visits = self.mean(Sum.CALLS, llm)
        roles = {
            role: self.mean(Sum.ROLE_CALLS, llm, role)
            for role in sorted(
                {role for flow, _ in self._flows for of, role in flow.named(Sum.ROLE_CALLS) if of == llm}
            )
        }
        busy, running = self.mean(Sum.BUSY_NS, llm), self.mean(Sum.RUNNING_NS, llm)
        return LLMDemand(
            llm=llm,
            visits=visits,
            visits_by_role=roles,
            parallelism=running / busy if busy > 0 else 1.0,
            overlap=self.mean(Sum.SEEN_NS, llm) / running if busy > 0 else 1.0,
            input_tokens=self.mean(Sum.INPUT_TOKENS, llm) / visits,
            cached_tokens=self.mean(Sum.CACHED_TOKENS, llm) / visits,
            output_tokens=self.mean(Sum.OUTPUT_TOKENS, llm) / visits,
            longest_tokens=max(flow.peak(Peak.LONGEST_TOKENS, llm) for flow, _ in self._flows),
            service_s=self.mean(Sum.SERVICE_NS, llm) / 1e9,
            share=share[0],
            share_low=share[1],
            share_high=share[2],
            share_cv=self.cv(Sum.SHARE, Sum.SHARE_SQUARED, Sum.WITH_SERVICE, llm),
            critical_visits=self.mean(Sum.CRITICAL_CALLS, llm),
            context_tokens=self.mean(Sum.DECODED_CONTEXT_TWICE, llm) / 2 / self.mean(Sum.DECODED_TOKENS, llm),
            prompt_pairs=self.mean(Sum.PROMPT_PAIRS, llm) / visits,
            output_cv=self.cv(Sum.OUTPUT_TOKENS, Sum.OUTPUT_TOKENS_SQUARED, Sum.CALLS, llm, count_names=(llm,)),
            burst=self.mean(Sum.BURST_SQUARES, llm) / visits,
            beside_tokens=self.mean(Sum.BURST_BESIDE_TOKENS, llm) / self.mean(Sum.BURSTS, llm),
        )

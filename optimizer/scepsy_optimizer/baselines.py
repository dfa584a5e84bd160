"""Allocations as others make them, on the same profiles: what a plan is compared with.

Each function takes what `optimize` takes and gives an allocation, to be predicted, replayed or deployed like any other.
None is weakened: where its source leaves something open, the choice that helps it is taken, and said.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from scepsy_optimizer.allocation import FRACTIONS, MAX_UTILISATION, Choice, Floats, Groups, Ints, replica_kinds
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.placement import place
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.replica import CallShape, loaded_speeds, saturation_rps
from scepsy_optimizer.workload import LLMDemand, Workload

Choices = dict[str, Groups]

AUTOSCALING_TARGET = 0.7
"""Utilisation at which an autoscaled LLM asks for another replica."""

_KEPT = 200


def even_split(
    llms: Sequence[str], profiles: Mapping[str, LLMProfile], *, devices: int, max_tensor_parallel_size: int
) -> Choices:
    """The allocation that people make without knowing anything: `split_by_weight` in equal parts."""
    weights = dict.fromkeys(llms, 1.0)
    return split_by_weight(weights, profiles, devices=devices, max_tensor_parallel_size=max_tensor_parallel_size)


def split_by_weight(
    weights: Mapping[str, float], profiles: Mapping[str, LLMProfile], *, devices: int, max_tensor_parallel_size: int
) -> Choices:
    """What people write down by hand: whole devices for each LLM in proportion to a weight of theirs.

    The weight is whatever they go by (equal parts, the calls that they expect, the size of the model); leftovers go to
    the largest remainders. Each LLM runs at the smallest tensor parallelism that holds it, with as many replicas as its
    devices allow. Raises ScepsyError where there are too few devices.
    """
    smallest = {llm: _smallest_size(profiles[llm], max_tensor_parallel_size) for llm in weights}
    given = dict(smallest)
    if sum(given.values()) > devices:
        raise ScepsyError(
            f"a split into whole devices needs at least {sum(given.values())} for "
            f"{', '.join(f'{llm} ({size})' for llm, size in smallest.items())}; the cluster has {devices}"
        )
    total = sum(weights.values())
    # Replica by replica to whoever is furthest below what its weight asks for.
    while True:
        left = devices - sum(given.values())
        open_to = [llm for llm in weights if smallest[llm] <= left]
        if not open_to:
            break
        neediest = max(open_to, key=lambda llm: weights[llm] / total * devices - given[llm])
        given[neediest] += smallest[neediest]
    return {llm: (_whole(smallest[llm], given[llm] // smallest[llm]),) for llm in weights}


def autoscaled(
    workload: Workload,
    profiles: Mapping[str, LLMProfile],
    *,
    rate_rps: float,
    devices: int,
    max_tensor_parallel_size: int,
    target: float = AUTOSCALING_TARGET,
) -> Choices:
    """Each LLM scaled alone to its own target, as a horizontal autoscaler does, once it has settled.

    Every LLM starts with one replica at the smallest tensor parallelism that holds it. While the load rises slowly to
    `rate_rps`, an LLM whose replicas reach the `target` utilisation asks for one more, and gets it until the devices
    are used up; later ones stay pending. What nobody asked for stays free. Raises ScepsyError where not even one
    replica of each fits.
    """
    sizes = {
        demand.llm: _smallest_size(profiles[demand.llm], max_tensor_parallel_size, CallShape.of(demand))
        for demand in workload.demands
    }
    left = devices - sum(sizes.values())
    if left < 0:
        raise ScepsyError(
            f"one replica of each LLM needs {sum(sizes.values())} devices, the cluster has {devices}: "
            "use a larger cluster"
        )
    # The rate of executions at which one replica of the LLM reaches the target.
    steps = {
        demand.llm: target
        * saturation_rps(profiles[demand.llm], sizes[demand.llm], 1.0, CallShape.of(demand))
        / demand.visits
        for demand in workload.demands
    }
    replicas = dict.fromkeys(sizes, 1)
    asking = [(step, llm) for llm, step in steps.items()]
    heapq.heapify(asking)
    while asking and asking[0][0] < rate_rps:
        _, llm = heapq.heappop(asking)
        if sizes[llm] > left:
            continue
        left -= sizes[llm]
        replicas[llm] += 1
        heapq.heappush(asking, (steps[llm] * replicas[llm], llm))
    return {llm: (_whole(sizes[llm], replicas[llm]),) for llm in sizes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Enumeration:
    """What the pruned enumeration found: the allocation, its latency by the paper's formula, and how many it rated."""

    choices: Choices
    latency_s: float
    rated: int


def paper_enumeration(
    workload: Workload,
    profiles: Mapping[str, LLMProfile],
    cluster: Cluster,
    *,
    rate_rps: float,
    steps_per_device: int = 10,
    max_utilisation: float = MAX_UTILISATION,
) -> Enumeration | None:
    """The paper's search (arXiv 2604.15186): device shares enumerated and pruned, rated by its own formula.

    Shares are whole numbers of `1 / steps_per_device` and use up the cluster; LLMs are ordered by what they add to the
    formula on one unloaded replica, and a heavier one never gets less; along the row of devices each LLM's shares are
    contiguous, so that it has whole devices and at most two pieces of one. On the whole ones it runs every tensor
    parallelism that uses them without waste, on each piece one replica. Calls divide in proportion to capacity, which
    the source leaves open. Several allocations are kept and the best that can be placed is returned; None where none
    carries the rate.
    """
    total = cluster.devices * steps_per_device
    rows = [
        _Row.of(
            demand,
            profiles[demand.llm],
            calls_rps=rate_rps * demand.visits,
            steps=steps_per_device,
            total=total,
            max_tensor_parallel_size=cluster.largest_domain,
            max_utilisation=max_utilisation,
        )
        for demand in workload.demands
    ]
    rows.sort(key=lambda row: -row.alone_s)
    best: list[tuple[float, int, tuple[int, ...]]] = []
    rated = 0

    def keep(costs: Floats, shares: Sequence[tuple[int, ...]]) -> None:
        for index in np.argsort(costs)[:_KEPT]:
            if not np.isfinite(costs[index]):
                break
            entry = (-float(costs[index]), len(best), shares[index])
            if len(best) < _KEPT:
                heapq.heappush(best, entry)
            elif entry > best[0]:
                heapq.heapreplace(best, entry)

    def extend(taken: tuple[int, ...], used: int, cost: float) -> None:
        nonlocal rated
        depth, left = len(taken), total - used
        most = min(left, taken[-1]) if taken else left
        behind = len(rows) - depth - 1
        if behind == 0:
            if left <= most:
                rated += 1
                keep(np.array([cost + rows[depth].cost[used % steps_per_device, left]]), [(*taken, left)])
            return
        # A heavier LLM never gets less: of what is left, at least an equal part.
        shares = np.arange(-(-left // (behind + 1)), most - (0 if most < left else behind) + 1)
        costs = cost + rows[depth].cost[used % steps_per_device, shares]
        if behind == 1:
            rest: Ints = left - shares
            costs = costs + rows[depth + 1].cost[(used + shares) % steps_per_device, rest]
            rated += len(shares)
            keep(costs, [(*taken, int(share), int(last)) for share, last in zip(shares, rest, strict=True)])
            return
        for share, so_far in zip(shares.tolist(), costs.tolist(), strict=True):
            if np.isfinite(so_far):
                extend((*taken, share), used + share, so_far)

    extend((), 0, 0.0)
    for cost, _, shares in sorted(best, reverse=True):
        choices, used = {}, 0
        for row, share in zip(rows, shares, strict=True):
            choices[row.llm] = row.groups(used % steps_per_device, share)
            used += share
        if place(choices, cluster) is not None:
            return Enumeration(choices=choices, latency_s=-cost, rated=rated)
    return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One LLM on the row of devices: its cost by where its run begins within a device, and how long it is.

    `cost` has one row for each offset and one column for each length; `size` is the tensor parallelism that it is
    reached at on the whole devices of the run. `alone_s` is its cost on one unloaded replica of the smallest size.
    """

    llm: str
    steps: int
    cost: Floats
    size: Ints
    alone_s: float

    @classmethod
    def of(
        cls,
        demand: LLMDemand,
        profile: LLMProfile,
        *,
        calls_rps: float,
        steps: int,
        total: int,
        max_tensor_parallel_size: int,
        max_utilisation: float,
    ) -> _Row:
        shape = CallShape.of(demand)
        kinds = [(size.tensor_parallel_size, Fraction(1)) for size in profile.steps]
        kinds = [kind for kind in kinds if kind[0] <= max_tensor_parallel_size]
        kinds += [(1, Fraction(piece, steps)) for piece in range(1, steps)]
        capacity = {kind: saturation_rps(profile, kind[0], float(kind[1]), shape) for kind in kinds}
        # From almost nothing: the closed form divides by the rate.
        load = np.linspace(0, 1, 201)[:-1] + 1e-6
        # Mean time of a call on a replica of each kind, by its utilisation: all replicas of an LLM have the same.
        times_s = {}
        for kind, most in capacity.items():
            if most > 0:
                speeds = loaded_speeds(profile, kind[0], float(kind[1]), shape, load * most, np.ones(len(load)))
                times_s[kind] = (
                    speeds.fixed_s + speeds.input_s * shape.computed_tokens + speeds.output_s * shape.generated_tokens
                )
        cost = np.full((steps, total + 1), np.inf)
        best_size = np.zeros((steps, total + 1), dtype=int)
        for offset in range(steps):
            for length in range(1, total + 1):
                whole, pieces = _cut(offset, length, steps)
                for size in {kind[0] for kind in kinds} if whole else {1}:
                    if whole % size:
                        continue
                    groups = [((size, Fraction(1)), whole // size)] if whole else []
                    groups += [((1, Fraction(piece, steps)), 1) for piece in pieces]
                    carried = [capacity.get(kind, 0.0) * count for kind, count in groups]
                    if min(carried) <= 0 or calls_rps > sum(carried) * max_utilisation:
                        continue
                    used = calls_rps / sum(carried)
                    mean_s = sum(
                        part / sum(carried) * float(np.interp(used, load, times_s[kind]))
                        for (kind, _), part in zip(groups, carried, strict=True)
                    )
                    value = mean_s * demand.visits / demand.parallelism
                    if value < cost[offset, length]:
                        cost[offset, length], best_size[offset, length] = value, size
        smallest = min(size for size, fraction in times_s if fraction == 1) if times_s else 0
        alone_s = float(times_s[smallest, Fraction(1)][0]) if smallest else np.inf
        return cls(
            llm=demand.llm,
            steps=steps,
            cost=cost,
            size=best_size,
            alone_s=alone_s * demand.visits / demand.parallelism,
        )

    def groups(self, offset: int, length: int) -> Groups:
        """The replicas of a run."""
        whole, pieces = _cut(offset, length, self.steps)
        size = int(self.size[offset, length])
        found = [_whole(size, whole // size)] if whole else []
        for piece in sorted(set(pieces), reverse=True):
            fraction = Fraction(piece, self.steps)
            found.append(Choice(tensor_parallel_size=1, fraction=fraction, replicas=pieces.count(piece)))
        return tuple(found)


def _cut(offset: int, length: int, steps: int) -> tuple[int, list[int]]:
    """Whole devices of a run, and the pieces of one at its ends."""
    head = min(length, (steps - offset) % steps)
    whole, tail = divmod(length - head, steps)
    return whole, [piece for piece in (head, tail) if piece]


def _whole(size: int, replicas: int) -> Choice:
    return Choice(tensor_parallel_size=size, fraction=Fraction(1), replicas=replicas)


def _smallest_size(profile: LLMProfile, max_tensor_parallel_size: int, shape: CallShape | None = None) -> int:
    kinds = replica_kinds(profile, max_tensor_parallel_size=max_tensor_parallel_size, fractions=FRACTIONS[:1])
    sizes = [kind.tensor_parallel_size for kind in kinds]
    sizes = [size for size in sizes if shape is None or saturation_rps(profile, size, 1.0, shape) > 0]
    if not sizes:
        raise ScepsyError(
            f"{profile.llm!r} ({profile.model}) does not fit at any tensor parallelism up to "
            f"{max_tensor_parallel_size}: use devices with more memory or a smaller model"
        )
    return min(sizes)

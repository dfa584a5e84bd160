"""Placement beside first-fit and CP-SAT, on clusters of 2 to 1,024 GPUs.

Four questions. Is anything unplaceable that CP-SAT places? How many more devices have the nodes in use, ours and those
of first-fit, than CP-SAT needs? How many calls from one LLM to the next leave their node, and how far do they go?
What does packing cost: the latency of what is placed against the optimum that only counts devices, and against the
optimum that knows what domains hold?
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise

import networkx as nx

from benchmarks.outcome import Bound, finish
from benchmarks.search import make_case
from scepsy_optimizer.allocation import UNITS_PER_DEVICE, Choice, Groups
from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB, Cluster, Node, parse_cluster, topology
from scepsy_optimizer.placement import check_placement, place
from scepsy_optimizer.plan import LLMPlan, Plan, Slot
from scepsy_optimizer.planner import optimize
from scepsy_optimizer.search import find_allocation, highest_rate

Slots = Mapping[str, tuple[tuple[Slot, ...], ...]]
Kind = tuple[int, Fraction]

OFFERED: tuple[Kind, ...] = (
    *((size, Fraction(1)) for size in (8, 4, 2, 1)),
    *((1, Fraction(tenths, 10)) for tenths in (5, 2, 1)),
)
BY_HAND: tuple[Kind, ...] = (
    *((size, Fraction(1)) for size in (6, 3, 2, 1)),
    *((1, Fraction(tenths, 10)) for tenths in (7, 6, 4, 3)),
)
INSTANCES = 40
FILLS = (0.5, 0.75, 0.9, 1.0)
TIMED_REPLICAS = 1000
TIMED_RUNS = 9
LOSS_CASES = 4


def clusters() -> dict[str, Cluster]:
    """Clusters by name: even ones, and ones whose domains suit nobody."""
    return {
        "2 H100": parse_cluster("2xH100"),
        "8 H100": parse_cluster("8xH100"),
        "4 x 8 H100, 2 racks": racks(parse_cluster("4x8xH100"), 2),
        "4 x 8 L40S": parse_cluster("4x8xL40S"),
        "5 x 7 H100, one broken each": uneven([[7]] * 5),
        "4 x (3 + 3) H100": uneven([[3, 3]] * 4),
        "4 + 6 + 8 + 2 H100": uneven([[4], [6], [8], [2]]),
        "128 x 8 H100, 16 racks": racks(parse_cluster("128x8xH100"), 16),
    }


def racks(cluster: Cluster, count: int) -> Cluster:
    """The same nodes in racks."""
    nodes = [
        Node(
            name=node.name,
            device_type=node.device_type,
            devices=node.devices,
            memory_gib=node.memory_gib,
            nvlink_domains=node.nvlink_domains,
            switch=f"rack{index * count // len(cluster.nodes)}",
        )
        for index, node in enumerate(cluster.nodes)
    ]
    return Cluster(nodes=tuple(nodes))


def uneven(nodes: list[list[int]]) -> Cluster:
    """Nodes with NVLink domains of the given sizes."""
    found = []
    for index, sizes in enumerate(nodes):
        numbers = iter(range(sum(sizes)))
        found.append(
            Node(
                name=f"node{index}",
                device_type="H100",
                devices=sum(sizes),
                memory_gib=DEVICE_MEMORY_GIB["H100"],
                nvlink_domains=tuple(tuple(next(numbers) for _ in range(size)) for size in sizes),
            )
        )
    return Cluster(nodes=tuple(found))


def main() -> int:
    """Run all parts, print, judge."""
    # In a process of its own: ortools and highspy, which the search loads, do not load into the same one.
    words = [sys.executable, "-m", "benchmarks.cp_sat_packing"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as solver:
        rows = [
            compare(name, cluster, kinds, solver)
            for name, cluster in clusters().items()
            for kinds in (OFFERED, BY_HAND)
        ]
        assert solver.stdin is not None
        solver.stdin.close()
    timed = {shape: milliseconds(parse_cluster(shape)) for shape in ("2x8xH100", "16x8xH100", "128x8xH100")}
    print()
    for shape, (count, plain_ms, calls_ms, spread_ms, kept_ms) in timed.items():
        print(
            f"{shape:>12}: {count:>5} replicas in {plain_ms:.0f} ms, {calls_ms:.0f} ms with calls, "
            f"{spread_ms:.0f} ms spread, {kept_ms:.0f} ms around a running plan"
        )
    unpacked, over_bound = loss()
    losses = [one for found in unpacked.values() for one in found]
    wrong = sum(row["wrong"] for row in rows)
    bounds = [
        Bound(name="unplaceable, but placed by CP-SAT", value=sum(row["missed"] for row in rows), at_most=0),
        Bound(name="placements that the check refuses", value=wrong, at_most=0),
        Bound(name="mean loss against the unpacked optimum", value=mean(losses), at_most=0.01),
        Bound(name="mean loss against what can be placed, all domains", value=mean(over_bound), at_most=0.01),
        Bound(name="placing 1,000 replicas on 1,024 GPUs (ms)", value=timed["128x8xH100"][1], at_most=100),
        Bound(name="the same with calls between LLMs (ms)", value=timed["128x8xH100"][2], at_most=100),
    ]
    return finish("placement", bounds, {"cases": rows, "times": timed, "unpacked": unpacked, "over_bound": over_bound})


def compare(name: str, cluster: Cluster, kinds: tuple[Kind, ...], solver: subprocess.Popen[str]) -> dict[str, float]:
    """One row: random allocations at several fills, placed by us, by first-fit and by CP-SAT."""
    rng = random.Random(f"{name}{len(kinds)}")
    distance = node_distances(cluster)
    fits = Counter[str]()
    spare: dict[str, list[float]] = defaultdict(list)
    leave: dict[str, list[float]] = defaultdict(list)
    far: dict[str, list[float]] = defaultdict(list)
    wrong = missed = undecided = 0
    instances = INSTANCES if cluster.devices <= 64 else 4
    for number in range(instances):
        allocation = draw(rng, cluster, kinds, fill=FILLS[number % len(FILLS)])
        calls = draw_calls(rng, list(allocation))
        ours, plain, first = (
            place(allocation, cluster, calls=calls),
            place(allocation, cluster),
            first_fit(allocation, cluster),
        )
        possible, fewest = with_cp_sat(solver, allocation, cluster)
        missed += possible is True and ours is None
        undecided += possible is None
        fits.update({"ours": ours is not None, "first": first is not None, "cp_sat": possible is True})
        for who, slots in (("ours", ours), ("first", first)):
            if slots is None:
                continue
            wrong += bool(check_placement(as_plan(allocation, slots, cluster))) if who == "ours" else 0
            used = {slot.node for groups in slots.values() for group in groups for slot in group}
            if ours is not None and first is not None and fewest:
                spare[who].append(sum(node.devices for node in cluster.nodes if node.name in used) / fewest - 1)
        for who, slots in (("ours", ours), ("plain", plain), ("first", first)):
            if slots is not None and first is not None and calls:
                crossing, way = transitions(slots, calls, distance)
                leave[who].append(crossing)
                far[who].append(way)
    row = {
        "cluster": name,
        "kinds": "offered" if kinds is OFFERED else "by hand",
        "instances": instances,
        **{f"unplaceable_{who}": 1 - fits[who] / instances for who in ("ours", "first", "cp_sat")},
        "missed": missed,
        "undecided": undecided,
        "wrong": wrong,
        **{f"spare_nodes_{who}": mean(spare[who]) for who in ("ours", "first")},
        **{f"leave_{who}": mean(leave[who]) for who in ("ours", "plain", "first")},
        **{f"distance_{who}": mean(far[who]) for who in ("ours", "first")},
    }
    if name == "2 H100" and kinds is OFFERED:
        print(
            f"{'cluster':28} {'kinds':8} {'unplaceable':^23} {'over fewest nodes':^17} "
            f"{'calls that leave the node':^26} {'distance':^13}\n"
            f"{'':28} {'':8} {'ours':>7} {'1st fit':>7} {'CP-SAT':>7} {'ours':>8} {'1st fit':>8} "
            f"{'ours':>8} {'no calls':>8} {'1st fit':>8} {'ours':>6} {'1st':>6}"
        )
    print(
        f"{name:28} {row['kinds']:8} {row['unplaceable_ours']:>7.0%} {row['unplaceable_first']:>7.0%} "
        f"{row['unplaceable_cp_sat']:>7.0%} {row['spare_nodes_ours']:>8.1%} {row['spare_nodes_first']:>8.1%} "
        f"{row['leave_ours']:>8.1%} {row['leave_plain']:>8.1%} {row['leave_first']:>8.1%} "
        f"{row['distance_ours']:>6.1f} {row['distance_first']:>6.1f}",
        flush=True,
    )
    return row


def mean(values: list[float]) -> float:
    """The mean; 0 of nothing."""
    return statistics.mean(values) if values else 0.0


def draw(rng: random.Random, cluster: Cluster, kinds: tuple[Kind, ...], *, fill: float) -> dict[str, Groups]:
    """A random allocation of up to six LLMs that takes about `fill` of the devices, never more than all."""
    left = int(fill * cluster.devices * UNITS_PER_DEVICE)
    llms = [f"llm{index}" for index in range(rng.randint(2, 6))]
    most = cluster.largest_domain
    counts: dict[str, Counter[Kind]] = {llm: Counter() for llm in llms}
    while usable := [(size, part) for size, part in kinds if size <= most and size * part * UNITS_PER_DEVICE <= left]:
        kind = rng.choice(usable)
        llm = rng.choice(llms)
        units = int(kind[0] * kind[1] * UNITS_PER_DEVICE)
        count = rng.randint(1, max(1, left // units // (2 * len(llms))))
        counts[llm][kind] += count
        left -= count * units
    return {
        llm: tuple(
            Choice(tensor_parallel_size=size, fraction=part, replicas=count) for (size, part), count in groups.items()
        )
        for llm, groups in counts.items()
        if groups
    }


def draw_calls(rng: random.Random, llms: list[str]) -> dict[tuple[str, str], float]:
    """A chain over the LLMs, and a few calls across it."""
    calls = {pair: rng.uniform(1, 4) for pair in pairwise(llms)}
    for _ in range(len(llms) // 2):
        one, other = rng.sample(llms, 2)
        calls[one, other] = calls.get((one, other), 0.0) + rng.uniform(0, 1)
    return calls


def first_fit(allocation: Mapping[str, Groups], cluster: Cluster) -> Slots | None:
    """Each replica, in the order given, on the first devices that hold it: what a naive scheduler does."""
    domains = [(node.name, domain) for node in cluster.nodes for domain in node.nvlink_domains]
    left = {(name, device): Fraction(1) for name, domain in domains for device in domain}
    slots: dict[str, tuple[tuple[Slot, ...], ...]] = {}
    for llm, groups in allocation.items():
        placed = []
        for choice in groups:
            group = []
            for _ in range(choice.replicas):
                for name, domain in domains:
                    open_ = [device for device in domain if left[name, device] >= choice.fraction]
                    if len(open_) >= choice.tensor_parallel_size:
                        break
                else:
                    return None
                taken = tuple(open_[: choice.tensor_parallel_size])
                for device in taken:
                    left[name, device] -= choice.fraction
                group.append(Slot(node=name, devices=taken))
            placed.append(tuple(group))
        slots[llm] = tuple(placed)
    return slots


def with_cp_sat(
    solver: subprocess.Popen[str], allocation: Mapping[str, Groups], cluster: Cluster
) -> tuple[bool | None, int]:
    """Whether CP-SAT places the allocation, and the fewest devices of nodes in use, 0 where it did not prove them."""
    sizes: Counter[int] = Counter()
    parts: Counter[int] = Counter()
    for groups in allocation.values():
        for choice in groups:
            if choice.fraction == 1:
                sizes[choice.tensor_parallel_size] += choice.replicas
            else:
                parts[int(choice.fraction * UNITS_PER_DEVICE)] += choice.replicas
    domains = [[len(domain) for domain in node.nvlink_domains] for node in cluster.nodes]
    assert solver.stdin is not None
    assert solver.stdout is not None
    print(json.dumps([domains, dict(sizes), dict(parts), UNITS_PER_DEVICE]), file=solver.stdin, flush=True)
    possible, fewest = json.loads(solver.stdout.readline())
    return possible, fewest


def node_distances(cluster: Cluster) -> dict[str, dict[str, float]]:
    """How far nodes are from each other in the topology."""
    graph = topology(cluster)
    names = [node.name for node in cluster.nodes]
    found = {}
    for name in names:
        lengths = nx.single_source_dijkstra_path_length(graph, ("node", name), weight="distance")
        found[name] = {other: float(lengths["node", other]) for other in names}
    return found


def transitions(
    slots: Slots, calls: Mapping[tuple[str, str], float], distance: Mapping[str, Mapping[str, float]]
) -> tuple[float, float]:
    """The share of calls that leave their node, and the mean distance between the nodes of a call and the next one.

    An LLM's calls spread over its replicas by the devices that these take.
    """
    where: dict[str, Counter[str]] = {}
    for llm, groups in slots.items():
        counts: Counter[str] = Counter()
        for group in groups:
            for slot in group:
                counts[slot.node] += len(slot.devices)
        where[llm] = counts
    crossing = way = total = 0.0
    for (one, other), rate in calls.items():
        weight = rate / (where[one].total() * where[other].total())
        for node, count in where[one].items():
            for next_, more in where[other].items():
                crossing += weight * count * more * (node != next_)
                way += weight * count * more * distance[node][next_]
        total += rate
    return crossing / total, way / total


def as_plan(allocation: Mapping[str, Groups], slots: Slots, cluster: Cluster) -> Plan:
    """A plan with nothing but its placement."""
    parts = [
        LLMPlan(
            llm=llm,
            model=llm,
            tensor_parallel_size=choice.tensor_parallel_size,
            fraction=float(choice.fraction),
            replicas=choice.replicas,
            slots=placed,
            max_num_seqs=1,
            max_num_batched_tokens=1,
            max_model_len=1,
            gpu_memory_utilization=0.9,
        )
        for llm, groups in allocation.items()
        for choice, placed in zip(groups, slots[llm], strict=True)
    ]
    return Plan(cluster=cluster, rate_rps=1.0, llms=tuple(parts))


def milliseconds(cluster: Cluster) -> tuple[int, float, float, float, float]:
    """Replicas, and median processor times to place them: plain, with calls, spread, and around a running plan."""
    scale = min(1.0, cluster.devices / 1024)
    half, fifth, tenth = Fraction(1, 2), Fraction(1, 5), Fraction(1, 10)
    wanted: dict[str, list[tuple[int, Fraction, int]]] = {
        "a": [(1, Fraction(1), 400), (1, half, 100)],
        "b": [(2, Fraction(1), 100), (1, fifth, 100)],
        "c": [(4, Fraction(1), 40), (1, tenth, 200)],
        "d": [(1, half, 60)],
    }
    allocation: dict[str, Groups] = {
        llm: tuple(
            Choice(tensor_parallel_size=size, fraction=part, replicas=max(1, int(count * scale)))
            for size, part, count in groups
        )
        for llm, groups in wanted.items()
    }
    calls = {("a", "b"): 2.0, ("b", "c"): 1.0, ("a", "c"): 0.5, ("c", "d"): 1.0}
    slots = place(allocation, cluster)
    assert slots is not None
    running = as_plan(allocation, slots, cluster)
    fewer = allocation | {"a": (allocation["a"][0],)}
    runs = (
        lambda: place(allocation, cluster),
        lambda: place(allocation, cluster, calls=calls),
        lambda: place(allocation, cluster, spread=True),
        lambda: place(fewer, cluster, prefer=running),
    )
    found = []
    for run in runs:
        times = []
        for _ in range(TIMED_RUNS):
            started_s = time.process_time()
            run()
            times.append(1000 * (time.process_time() - started_s))
        found.append(statistics.median(times))
    count = sum(choice.replicas for groups in allocation.values() for choice in groups)
    return (count, found[0], found[1], found[2], found[3])


def loss() -> tuple[dict[str, list[float]], list[float]]:
    """How much slower plans are than two optima, on the clusters of 4 to 64 devices.

    By cluster: against one where only the number of devices counts, the same devices in domains as large as the largest
    group. And, of all: against the proven bound of whatever can be placed on the cluster.
    """
    unpacked: dict[str, list[float]] = {}
    bound = []
    for name, cluster in clusters().items():
        if not 4 <= cluster.devices <= 64 or cluster.largest_domain == 1:
            continue
        largest = 1 << (cluster.largest_domain.bit_length() - 1)
        full, rest = divmod(cluster.devices, largest)
        counted = uneven([[largest]] * full + ([[rest]] if rest else []))
        unpacked[name] = []
        for seed in range(LOSS_CASES):
            workload, profiles = make_case(3, seed=seed)
            rate_rps = (0.4, 0.8)[seed % 2] * highest_rate(workload, profiles, cluster)[0]
            best = find_allocation(workload, profiles, counted, rate_rps=rate_rps)
            placed = optimize(workload, profiles, cluster, rate_rps=rate_rps).prediction
            assert best is not None
            assert placed is not None
            unpacked[name].append(max(0.0, placed.latency_s / best.latency_s - 1))
            bound.append(placed.latency_s / placed.lower_bound_s - 1)
        print(
            f"{name:28} latency over the unpacked optimum: mean {mean(unpacked[name]):.2%}, "
            f"worst {max(unpacked[name]):.2%}; over the bound of what can be placed: "
            f"worst {max(bound[-LOSS_CASES:]):.2%}",
            flush=True,
        )
    return unpacked, bound


if __name__ == "__main__":
    sys.exit(main())

"""Bin packing of few sizes into bins of given capacities, exact: for what packing largest first leaves over.

Largest first never loses where every size divides the next larger one (Coffman, Garey and Johnson, Bin packing with
divisible item sizes, 1987), which holds for tensor-parallel groups of powers of two. Other sizes need a search: bin
completion (Korf, 2002), here over counts of sizes rather than items, because many items are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

_MAX_STATES = 5000


def pack(
    capacities: Sequence[int], counts: Mapping[int, int], *, max_states: int = _MAX_STATES
) -> list[dict[int, int]] | None:
    """How many items of each size go into each bin, so that all `counts` items are placed; None where they do not fit.

    `counts` has the number of items by size, sizes at least 1. None as well where `max_states` did not suffice to tell.
    """
    sizes = sorted((size for size, count in counts.items() if count), reverse=True)
    wanted = tuple(counts[size] for size in sizes)
    slack = sum(capacities) - sum(size * count for size, count in zip(sizes, wanted, strict=True))
    if slack < 0:
        return None
    order = sorted(range(len(capacities)), key=lambda index: capacities[index])
    alike = len(set(capacities)) == 1
    filled: list[tuple[int, ...]] = []
    failed: set[tuple[int, tuple[int, ...]]] = set()

    def open_bin(left: tuple[int, ...], slack: int) -> tuple[tuple[int, ...], int, Iterator[tuple[int, ...]]]:
        capacity = capacities[order[len(filled)]]
        return left, slack, iter(_fillings(capacity, sizes, left, slack, with_largest=alike))

    # Depth first over the bins, from the smallest on: what is left, how much may be wasted, what fills the next bin.
    left = wanted
    stack = [open_bin(left, slack)] if any(left) and capacities else []
    while stack and any(left):
        before, slack, fillings = stack[-1]
        filling = next(fillings, None)
        if filling is None:
            failed.add((len(stack), before))
            if len(failed) > max_states:
                return None
            stack.pop()
            if filled:
                filled.pop()
            continue
        waste = capacities[order[len(filled)]] - _sum(sizes, filling)
        left = tuple(have - take for have, take in zip(before, filling, strict=True))
        filled.append(filling)
        if any(left):
            if len(filled) < len(order) and (len(filled) + 1, left) not in failed:
                stack.append(open_bin(left, slack - waste))
            else:
                filled.pop()
    if any(left):
        return None
    packed: list[dict[int, int]] = [{} for _ in capacities]
    for index, filling in zip(order, filled, strict=False):
        packed[index] = {size: count for size, count in zip(sizes, filling, strict=True) if count}
    return packed


def fewest_bins(capacity: int, counts: Mapping[int, int], *, most: int) -> int | None:
    """Bins of one capacity that hold `counts` items by size, largest first; an exact packing where these exceed `most`.

    None where they do not fit into `most`, or that was not found out.
    """
    left = {size: counts[size] for size in sorted(counts, reverse=True) if counts[size]}
    bins = 0
    while left:
        room, filling = capacity, {}
        for size, count in left.items():
            if taken := min(count, room // size):
                filling[size] = taken
                room -= taken * size
        # As many bins as can be filled alike.
        alike = min(left[size] // taken for size, taken in filling.items())
        bins += alike
        left = {size: rest for size, count in left.items() if (rest := count - alike * filling.get(size, 0))}
    if bins <= most:
        return bins
    return most if most > 0 and pack([capacity] * most, counts) is not None else None


def _fillings(
    capacity: int, sizes: Sequence[int], left: Sequence[int], slack: int, *, with_largest: bool
) -> list[tuple[int, ...]]:
    """Every way to fill one bin that wastes no more than `slack` and leaves no room for an item that is left over.

    The least waste comes first, then the largest items. A bin with room for another item is never needed: moving that
    item there from a later bin changes nothing else. Where all bins are alike, the largest item may as well be in the
    next one (`with_largest`).
    """
    largest = next(position for position, have in enumerate(left) if have)

    def fill(position: int, room: int, taken: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
        if position == len(sizes):
            if room <= slack and not any(
                size <= room and have > take for size, have, take in zip(sizes, left, taken, strict=True)
            ):
                yield room, taken
            return
        least = 1 if with_largest and position == largest else 0
        for count in range(min(left[position], room // sizes[position]), least - 1, -1):
            yield from fill(position + 1, room - count * sizes[position], (*taken, count))

    return [
        filling for _, filling in sorted(fill(0, capacity, ()), key=lambda one: (one[0], [-count for count in one[1]]))
    ]


def _sum(sizes: Sequence[int], counts: Sequence[int]) -> int:
    return sum(size * count for size, count in zip(sizes, counts, strict=True))

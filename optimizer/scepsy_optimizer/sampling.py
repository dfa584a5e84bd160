"""Random choices that depend on nothing but the id of an execution, so that parts of a whole make the same ones.

A sample keeps the executions of the smallest hashes (bottom-k sampling), which is a uniform sample without replacement.
Bootstrap weights are Poisson with mean 1 (Chamandy et al., Estimating uncertainty for massive data streams, 2012): each
execution draws its own, independent of how many others there are.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from scepsy_optimizer.executions import Execution

RESAMPLES = 1000
"""Bootstrap resamples; four of them share one 64-bit random number."""


def hash_of(execution: str) -> int:
    """64 bits that look random, and are the same for the same id everywhere."""
    return int.from_bytes(blake2b(execution.encode("utf-8", "surrogatepass"), digest_size=8).digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLimits:
    """How many executions a sample may hold, and how many spans in them."""

    executions: int = 2_000
    spans: int = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """An execution with its place in the order in which a sample takes executions."""

    key: tuple[int, str]
    execution: Execution


_key = attrgetter("key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The executions of the smallest hashes, in that order, as many as the limits allow.

    `cut` is the first that did not fit, None as long as everything fitted.
    """

    chosen: tuple[Sampled, ...] = ()
    cut: tuple[int, str] | None = None

    @property
    def executions(self) -> list[Execution]:
        """In the order of their start."""
        return sorted((item.execution for item in self.chosen), key=lambda found: (found.started_ns, found.id))


class Sampler:
    """A sample while executions come."""

    def __init__(self, limits: SampleLimits, sample: Sample | None = None) -> None:
        self._limits = limits
        self._chosen = list(sample.chosen) if sample is not None else []
        self._cut = sample.cut if sample is not None else None
        self._spans = sum(len(item.execution.spans) for item in self._chosen)

    def add(self, item: Sampled) -> None:
        """Take an execution if it is among the smallest."""
        if self._cut is not None and item.key >= self._cut:
            return
        insort(self._chosen, item, key=_key)
        self._spans += len(item.execution.spans)
        # The first is kept however large it is: an empty sample would say nothing.
        while len(self._chosen) > 1 and self._is_over():
            last = self._chosen.pop()
            self._spans -= len(last.execution.spans)
            self._cut = last.key

    def restrict(self, cut: tuple[int, str] | None) -> None:
        """Leave out what another sample of the same whole could not have taken."""
        if cut is not None and (self._cut is None or cut < self._cut):
            self._cut = cut
            self._chosen = [item for item in self._chosen if item.key < cut]
            self._spans = sum(len(item.execution.spans) for item in self._chosen)

    def sample(self) -> Sample:
        """What is in it now."""
        return Sample(chosen=tuple(self._chosen), cut=self._cut)

    def _is_over(self) -> bool:
        return len(self._chosen) > self._limits.executions or self._spans > self._limits.spans


def merge_samples(one: Sample, other: Sample, limits: SampleLimits) -> Sample:
    """The sample of the whole, out of those of two parts of it that have no execution in common."""
    sampler = Sampler(limits, one)
    sampler.restrict(other.cut)
    for item in other.chosen:
        sampler.add(item)
    return sampler.sample()


def bootstrap_weights(hashes: Sequence[int] | Iterable[int]) -> NDArray[np.int64]:
    """How often each execution (rows) counts in each resample (columns)."""
    start = np.fromiter(hashes, dtype=np.uint64)
    # The finaliser of SplitMix64 (Steele, Lea, Flood, 2014) over the hash and the number of the resample.
    steps = np.arange(1, RESAMPLES // 4 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = start[:, None] + steps[None, :]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    weights: NDArray[np.int64] = _POISSON[mixed.view(np.uint16)]
    return weights


def _poisson_table() -> NDArray[np.int64]:
    """The Poisson(1) quantile of each 16-bit number."""
    cumulated = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(12)])
    middles = (np.arange(1 << 16) + 0.5) / (1 << 16)
    return np.searchsorted(cumulated, middles).astype(np.int64)


_POISSON = _poisson_table()

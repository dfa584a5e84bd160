"""What the demonstration asks, and when: seeded questions and Poisson arrivals for each example workflow."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SUBJECTS = (
    "tidal power", "sleep", "bridges", "yeast", "glaciers", "compilers", "coral reefs", "paper money", "tunnels",
    "honey bees", "steam engines", "maps", "concrete", "lighthouses", "volcanoes", "vaccines", "satellites", "silk",
)  # fmt: skip
_ASKED = (
    "What limits {}?", "How did {} change trade?", "What is often misunderstood about {}?",
    "Which discovery mattered most for {}?", "What would replace {} tomorrow?", "Why do experts disagree about {}?",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """The executions of one workflow: question and moment of arrival, in seconds from the start, for each."""

    questions: tuple[str, ...]
    at_s: tuple[float, ...]


def make_schedule(workflows: Sequence[str], *, rate_rps: float, seconds: float, seed: int) -> Mapping[str, Arrivals]:
    """Poisson arrivals at `rate_rps` in total, spread evenly at random over the workflows; no question comes twice."""
    rng = random.Random(seed)  # noqa: S311 - a reproducible load, not a secret
    questions = [asked.format(subject) for asked in _ASKED for subject in _SUBJECTS]
    rng.shuffle(questions)
    found: dict[str, list[tuple[float, str]]] = {workflow: [] for workflow in workflows}
    at_s = rng.expovariate(rate_rps)
    index = 0
    while at_s < seconds:
        question = questions[index % len(questions)]
        if index >= len(questions):
            question += f" (view {index // len(questions) + 1})"
        found[rng.choice(list(workflows))].append((at_s, question))
        at_s += rng.expovariate(rate_rps)
        index += 1
    return {
        workflow: Arrivals(
            questions=tuple(question for _, question in pairs), at_s=tuple(moment for moment, _ in pairs)
        )
        for workflow, pairs in found.items()
    }

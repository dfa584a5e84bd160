"""Reasoning by beam search on LangChain: a generator proposes steps, a verifier scores them, the best ones go on.

Every round extends each surviving line of reasoning in several ways at once and scores each result as soon as it is
there, until one is good enough. How many calls that takes depends on the answers: easy questions end after one round.

    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none python examples/beam_search.py "Why is the sky blue?"

The endpoint may be any OpenAI-compatible one. GENERATOR_MODEL and VERIFIER_MODEL name its models.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import zlib
from dataclasses import dataclass

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

import scepsy

BEAMS = 2  # lines of reasoning that survive a round
OPTIONS = 3  # ways in which each of them is continued
ROUNDS = 4  # at most
ACCEPTED = 9  # a score, out of 10, that ends the search

API_KEY = os.environ.get("OPENAI_API_KEY", "none")
generator = ChatOpenAI(model=os.environ.get("GENERATOR_MODEL", "generator"), api_key=API_KEY, max_completion_tokens=200)
verifier = ChatOpenAI(model=os.environ.get("VERIFIER_MODEL", "verifier"), api_key=API_KEY, max_completion_tokens=8)

proposing = (
    ChatPromptTemplate.from_messages(
        [
            ("system", "You reason step by step. Write the next step only. It must differ from other attempts."),
            ("human", "Question: {question}\n\nSteps so far:\n{steps}\n\nThis is attempt {option}. The next step:"),
        ]
    )
    | generator
    | StrOutputParser()
)
judging = (
    ChatPromptTemplate.from_messages(
        [
            ("system", "You grade reasoning. Answer with one whole number from 0 (useless) to 10 (settles it)."),
            ("human", "Question: {question}\n\nReasoning:\n{steps}\n\nGrade:"),
        ]
    )
    | verifier
    | StrOutputParser()
)


@dataclass(frozen=True, slots=True)
class Beam:
    """A line of reasoning and the verifier's score for it."""

    steps: tuple[str, ...] = ()
    score: int = 0


@scepsy.agent
async def propose(question: str, beam: Beam, option: int) -> str:
    """One way to continue a line of reasoning."""
    steps = "\n".join(beam.steps) or "(none)"
    return await proposing.ainvoke({"question": question, "steps": steps, "option": option})


@scepsy.agent
async def judge(question: str, steps: tuple[str, ...]) -> int:
    """What a line of reasoning is worth, from 0 to 10."""
    return grade(await judging.ainvoke({"question": question, "steps": "\n".join(steps)}))


async def extend(question: str, beam: Beam, option: int) -> Beam:
    """A line of reasoning, one scored step longer."""
    steps = (*beam.steps, await propose(question, beam, option))
    return Beam(steps, await judge(question, steps))


@scepsy.workflow(name="beam-search")
async def run(question: str) -> str:
    """The best line of reasoning that was found."""
    beams = [Beam()]
    for _ in range(ROUNDS):
        candidates = await asyncio.gather(
            *(extend(question, beam, option) for beam in beams for option in range(1, OPTIONS + 1))
        )
        beams = sorted(candidates, key=lambda beam: beam.score, reverse=True)[:BEAMS]
        if beams[0].score >= ACCEPTED:
            break
    return "\n".join(beams[0].steps)


def grade(answer: str) -> int:
    """The first number in the verifier's answer; verifiers that give none are graded by what they said instead."""
    found = re.search(r"\d+", answer)
    return min(int(found[0][:3]), 10) if found else zlib.crc32(answer.encode()) % 11


if __name__ == "__main__":
    scepsy.instrument()
    print(asyncio.run(run(" ".join(sys.argv[1:]) or "How many squares are there on a chessboard?")))

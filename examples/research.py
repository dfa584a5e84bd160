"""Recursive map-reduce research on the plain OpenAI client: split a question, research the parts, write it up.

The generator splits a question into parts, each part is researched in parallel by the same procedure, down to
questions that are narrow enough to take notes on, and the writer reduces notes to a report, level by level. How deep
and how wide it goes depends on the answers.

    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none python examples/research.py "What limits tidal power?"

The endpoint may be any OpenAI-compatible one. GENERATOR_MODEL and WRITER_MODEL name its models.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import zlib

import openai

import scepsy

DEPTH = 2  # levels of splitting, at most
PARTS = 3  # parts of a question, at most
BROAD = 4  # how broad a question must be, out of 10, to be split further

client = openai.AsyncOpenAI(api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=600)
GENERATOR = os.environ.get("GENERATOR_MODEL", "generator")
WRITER = os.environ.get("WRITER_MODEL", "writer")


async def ask(model: str, prompt: str, max_tokens: int) -> str:
    """A model's answer."""
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens
    )
    return answer.choices[0].message.content or ""


@scepsy.agent
async def split(question: str) -> tuple[int, list[str]]:
    """How broad a question is, from 0 to 10, and the parts that it falls into."""
    answer = await ask(
        GENERATOR,
        f"How broad is this question? Write a number from 0 (one fact) to 10 (a book), then up to {PARTS} narrower "
        f"questions that together answer it, one per line.\n\nQuestion: {question}",
        max_tokens=160,
    )
    return breadth(answer), parts(answer)


@scepsy.agent
async def take_notes(question: str) -> str:
    """Notes on a narrow question."""
    return await ask(GENERATOR, f"Write short notes that answer this question: {question}", max_tokens=200)


@scepsy.agent
async def write(question: str, notes: list[str]) -> str:
    """Notes on the parts of a question, reduced to one text."""
    joined = "\n\n".join(notes)
    return await ask(WRITER, f"Answer the question from these notes.\n\n{joined}\n\nQuestion: {question}", 300)


@scepsy.agent
async def research(question: str, depth: int = 0) -> str:
    """What there is to say about a question; calls itself for the parts of a broad one."""
    if depth == DEPTH:
        return await take_notes(question)
    broad, questions = await split(question)
    if depth > 0 and broad < BROAD:
        return await take_notes(question)
    notes = await asyncio.gather(*(research(part, depth + 1) for part in questions))
    return await write(question, list(notes))


@scepsy.workflow(name="research")
async def run(question: str) -> str:
    """A report on a question."""
    return await research(question)


def breadth(answer: str) -> int:
    """The first number in an answer; one without any counts by what it says instead."""
    found = re.search(r"\d+", answer)
    return min(int(found[0][:3]), 10) if found else zlib.crc32(answer.encode()) % 11


def parts(answer: str) -> list[str]:
    """The lines of an answer as questions; one that is all in one line is cut into two or three of equal length."""
    lines = [line.strip(" -*0123456789.)") for line in answer.splitlines()]
    lines = [line for line in lines if len(line) > 3][:PARTS]
    if len(lines) > 1:
        return lines
    words = answer.split()
    number = min(2 + zlib.crc32(answer.encode()) % (PARTS - 1), max(1, len(words)))
    size = -(-len(words) // number) or 1
    return [" ".join(words[at : at + size]) for at in range(0, len(words), size)] or [answer]


if __name__ == "__main__":
    scepsy.instrument()
    print(asyncio.run(run(" ".join(sys.argv[1:]) or "What limits tidal power?")))

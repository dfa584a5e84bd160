"""An agent without any framework: asyncio, the openai client and three marks. Drafts at once, a vote, one revision.

    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none python examples/plain_asyncio.py "Why is ice slippery?"

The endpoint may be any OpenAI-compatible one. WRITER_MODEL drafts and revises, VERIFIER_MODEL grades. The openai client
is hooked, and calls in tasks are known to belong to the workflow that started them.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import zlib

import openai

import scepsy

DRAFTS = 3

client = openai.AsyncOpenAI(api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=600)


async def ask(model: str, prompt: str, max_tokens: int) -> str:
    """A model's answer."""
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens
    )
    return answer.choices[0].message.content or ""


@scepsy.agent
async def write(prompt: str) -> str:
    """A text by the writer."""
    return await ask(os.environ.get("WRITER_MODEL", "writer"), prompt, 200)


@scepsy.agent
async def grade(question: str, draft: str) -> int:
    """What a draft is worth, from 0 to 10; a grader that gives no number is taken by what it says instead."""
    prompt = f"Question: {question}\nAnswer: {draft}\nGrade the answer from 0 to 10. One number:"
    answer = await ask(os.environ.get("VERIFIER_MODEL", "verifier"), prompt, 8)
    found = re.search(r"\d+", answer)
    return min(int(found[0][:3]), 10) if found else zlib.crc32(answer.encode()) % 11


@scepsy.workflow(name="best-of-three")
async def run(question: str) -> str:
    """The best of several drafts, revised."""
    drafts = await asyncio.gather(*(write(f"Draft {number}: {question}") for number in range(1, DRAFTS + 1)))
    grades = await asyncio.gather(*(grade(question, draft) for draft in drafts))
    best = max(zip(grades, drafts, strict=True))[1]
    return await write(f"Make this answer shorter and clearer.\nQuestion: {question}\nAnswer: {best}")


if __name__ == "__main__":
    scepsy.instrument()
    print(asyncio.run(run(" ".join(sys.argv[1:]) or "Why is ice slippery?")))

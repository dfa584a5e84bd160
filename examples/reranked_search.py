"""A LlamaIndex Workflow with a reranker: widen a question, rerank what each query finds, answer from the best.

Three steps and the events between them. The writer turns the question into queries; for each of them a small reranker
model grades the passages, all at once; when all have reported, the writer answers.

    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none python examples/reranked_search.py "What is flutter?"

The endpoint may be any OpenAI-compatible one. RERANKER_MODEL and WRITER_MODEL name its models. Nothing of the workflow
is marked: its class names the workflow, and its steps are the roles.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import zlib

from llama_index.core.workflow import Context, Event, StartEvent, StopEvent, Workflow, step
from llama_index.llms.openai_like import OpenAILike

import scepsy

QUERIES = 3  # into which a question is widened
BEST = 2  # passages of each query that are kept

PASSAGES = (
    "Flutter is an oscillation that feeds on the air flow it disturbs; long thin decks are stiffened against it.",
    "A suspension bridge carries its deck on cables that run over towers and are anchored in the ground.",
    "The Tacoma Narrows bridge fell in 1940 in a steady wind of moderate speed, four months after it was opened.",
    "Dampers turn motion into heat; the Millennium footbridge in London was given ninety of them.",
    "Cable-stayed bridges hang the deck from towers directly, and are stiffer at medium spans.",
    "Wind tunnels test models of bridge decks, since flutter depends on the shape of the section.",
)


def served(model: str, max_tokens: int) -> OpenAILike:
    """A chat model of the endpoint."""
    return OpenAILike(
        model=model,
        api_base=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        max_tokens=max_tokens,
        is_chat_model=True,
        timeout=600,
    )


reranker = served(os.environ.get("RERANKER_MODEL", "reranker"), max_tokens=8)
writer = served(os.environ.get("WRITER_MODEL", "writer"), max_tokens=200)


class Query(Event):
    """One of the queries that a question became."""

    text: str


class Found(Event):
    """The best passages for a query."""

    passages: list[str]


class RerankedSearch(Workflow):
    """Widen, rerank, answer."""

    @step
    async def widen(self, ctx: Context, ev: StartEvent) -> Query | None:
        """Send the question in several wordings."""
        await ctx.store.set("question", ev.question)
        answer = await writer.acomplete(f"Write {QUERIES} search queries, one per line, for: {ev.question}")
        for text in [ev.question, *answer.text.splitlines(), *[ev.question] * QUERIES][:QUERIES]:
            ctx.send_event(Query(text=text))
        return None

    @step(num_workers=QUERIES)
    async def rerank(self, ev: Query) -> Found:
        """Grade every passage by a call of its own."""
        answers = await asyncio.gather(
            *(
                reranker.acomplete(f"Query: {ev.text}\nPassage: {passage}\nHow relevant, from 0 to 10? One number:")
                for passage in PASSAGES
            )
        )
        ranked = sorted(zip(map(grade, (each.text for each in answers)), PASSAGES, strict=True), reverse=True)
        return Found(passages=[passage for _, passage in ranked[:BEST]])

    @step
    async def answer(self, ctx: Context, ev: Found) -> StopEvent | None:
        """Answer when every query has reported."""
        found = ctx.collect_events(ev, [Found] * QUERIES)
        if found is None:
            return None
        best = {passage for each in found for passage in each.passages}
        passages = "\n".join(passage for passage in PASSAGES if passage in best)
        question = await ctx.store.get("question")
        return StopEvent(result=str(await writer.acomplete(f"{passages}\n\nAnswer from these passages: {question}")))


def grade(answer: str) -> int:
    """The first number in a grader's answer; graders that give none are taken by what they said instead."""
    found = re.search(r"\d+", answer)
    return min(int(found[0][:3]), 10) if found else zlib.crc32(answer.encode()) % 11


async def run(question: str) -> str:
    """The answer to a question from the passages of this file."""
    return str(await RerankedSearch(timeout=600).run(question=question))


if __name__ == "__main__":
    scepsy.instrument()
    print(asyncio.run(run(" ".join(sys.argv[1:]) or "Why do long bridges sway in the wind?")))

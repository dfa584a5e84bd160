"""Question answering over documents on LlamaIndex: retrieve, rerank each passage by a model, look again, write.

A keyword retriever finds candidates, a small reranker model grades each of them by a call of its own, all at once.
Where too few are relevant, the question is rephrased and the next candidates are tried; then the writer answers from
the best ones. How often it looks again depends on the grades.

    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none python examples/retrieval.py "Why do bridges sway?"

The endpoint may be any OpenAI-compatible one. RERANKER_MODEL and WRITER_MODEL name its models.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Sequence

from llama_index.core import QueryBundle, get_response_synthesizer
from llama_index.core.llms import LLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.openai_like import OpenAILike

import scepsy

CANDIDATES = 6  # passages graded in a round
ROUNDS = 3  # at most
RELEVANT = 7  # a grade, out of 10, that makes a passage worth quoting
ENOUGH = 3  # relevant passages that end the search

PASSAGES = (
    "A suspension bridge hangs its deck from cables; long decks sway in wind and must be stiffened against flutter.",
    "The Tacoma Narrows bridge fell in 1940 because its thin deck twisted in a steady wind of moderate speed.",
    "Tidal power is limited by sites: only a few coasts have a range above five metres, and barrages change habitats.",
    "A tidal turbine works like a wind turbine under water and is paid back slowly, since maintenance needs calm seas.",
    "Deep sleep comes early in the night; the brain clears waste then, and memories of facts are strengthened.",
    "Shift workers sleep less and worse, since light at night moves the inner clock that sets the time of sleep.",
    "Baker's yeast turns sugar to carbon dioxide and alcohol; the gas is caught by gluten and makes the bread rise.",
    "Glaciers flow under their own weight, slide on melt water, and grind valleys into the shape of a U.",
    "A compiler translates a program in passes: parsing, checking types, optimising, and generating machine code.",
    "Coral reefs bleach when warm water drives out the algae that feed them; they can recover if it cools in time.",
    "Paper money began as receipts for coins in China; trust in the issuer, not metal, is what gives it value.",
    "Tunnels under rivers were first dug behind a shield, an iron frame that holds the earth while workers line it.",
    "Honey bees tell each other about flowers by dancing: the angle gives the direction, the length the distance.",
    "Watt's steam engine kept the cylinder hot by condensing the steam elsewhere, and so burned a third of the coal.",
    "Maps that keep angles, as Mercator's does, stretch the lands near the poles; those that keep areas bend shapes.",
    "Roman concrete was mixed with volcanic ash and sea water; minerals growing in its cracks have kept piers whole.",
    "Lighthouse lenses by Fresnel bend the light of one lamp into a beam that is seen from twenty miles away.",
    "Volcanoes cool the world for a year or two when they throw sulphur high enough to make a veil of droplets.",
    "Vaccines show the immune system a harmless part of a germ, so that its memory answers faster the next time.",
    "A satellite in geostationary orbit circles once a day at 35,786 kilometres and seems to stand still.",
    "Silk was carried from China along roads that also spread paper, faiths and plagues between the continents.",
    "Trade grew with steam ships and the Suez canal, which cut the way from London to Bombay by two fifths.",
    "Experts disagree when evidence is thin, when methods differ, and when they answer different questions.",
    "A discovery matters most when it lets others ask what they could not ask before, as the microscope did.",
)

API_BASE = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
API_KEY = os.environ.get("OPENAI_API_KEY", "none")


def served(model: str, max_tokens: int) -> OpenAILike:
    """A chat model of the endpoint."""
    return OpenAILike(
        model=model, api_base=API_BASE, api_key=API_KEY, max_tokens=max_tokens, is_chat_model=True, timeout=600
    )


reranker = served(os.environ.get("RERANKER_MODEL", "reranker"), max_tokens=8)
writer = served(os.environ.get("WRITER_MODEL", "writer"), max_tokens=300)
rephraser = served(os.environ.get("WRITER_MODEL", "writer"), max_tokens=40)


def terms(text: str) -> list[str]:
    """Lower-case words without their plural."""
    return [word.rstrip("s") for word in re.findall(r"[a-z]{3,}", text.lower())]


def grade(answer: str) -> int:
    """The first number in a grader's answer; graders that give none are taken by what they said instead."""
    found = re.search(r"\d+", answer)
    return min(int(found[0][:3]), 10) if found else zlib.crc32(answer.encode()) % 11


class KeywordRetriever(BaseRetriever):
    """Okapi BM25 over passages held in memory."""

    def __init__(self, passages: Sequence[str], k1: float = 1.5, b: float = 0.75) -> None:
        super().__init__()
        self._nodes = [TextNode(text=passage, id_=f"passage-{number}") for number, passage in enumerate(passages)]
        self._terms = [Counter(terms(passage)) for passage in passages]
        mean = sum(found.total() for found in self._terms) / len(passages)
        self._scale = [k1 * (1 - b + b * found.total() / mean) for found in self._terms]
        self._gain = k1 + 1

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        scores = [0.0] * len(self._nodes)
        for term in set(terms(query_bundle.query_str)):
            holders = sum(term in found for found in self._terms)
            weight = math.log(1 + (len(self._nodes) - holders + 0.5) / (holders + 0.5))
            for index, found in enumerate(self._terms):
                scores[index] += weight * found[term] * self._gain / (found[term] + self._scale[index])
        ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return [NodeWithScore(node=self._nodes[index], score=scores[index]) for index in ranked]


class ModelReranker(BaseNodePostprocessor):
    """Grades every passage by a call of its own, all of them at once, and sorts by the grade."""

    llm: LLM

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        question = query_bundle.query_str if query_bundle is not None else ""
        answers = await asyncio.gather(
            *(
                self.llm.acomplete(
                    f"Question: {question}\nPassage: {node.get_content()}\n"
                    "How relevant is the passage? Answer with one whole number from 0 to 10:"
                )
                for node in nodes
            )
        )
        graded = [
            NodeWithScore(node=node.node, score=grade(answer.text)) for node, answer in zip(nodes, answers, strict=True)
        ]
        return sorted(graded, key=lambda node: node.score or 0, reverse=True)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return asyncio.run(self._apostprocess_nodes(nodes, query_bundle))


retriever = KeywordRetriever(PASSAGES)
reranking = ModelReranker(llm=reranker)
writing = get_response_synthesizer(llm=writer, use_async=True)


@scepsy.tool
async def search(query: str, seen: set[str]) -> list[NodeWithScore]:
    """The best passages for a query that were not seen before."""
    found = await retriever.aretrieve(query)
    return [node for node in found if node.node_id not in seen][:CANDIDATES]


@scepsy.agent
async def rerank(question: str, candidates: list[NodeWithScore]) -> list[NodeWithScore]:
    """The candidates that are relevant, best first, each with its grade."""
    graded = await reranking.apostprocess_nodes(candidates, query_str=question)
    return [node for node in graded if (node.score or 0) >= RELEVANT]


@scepsy.agent
async def rephrase(question: str) -> str:
    """The question in other words, for another search."""
    return (await rephraser.acomplete(f"Write five other search terms for this question: {question}")).text


@scepsy.agent
async def write(question: str, passages: list[NodeWithScore]) -> str:
    """An answer from the passages."""
    return str(await writing.asynthesize(question, nodes=passages))


@scepsy.workflow(name="retrieval")
async def run(question: str) -> str:
    """The answer to a question from the passages of this file."""
    query = question
    seen: set[str] = set()
    candidates: list[NodeWithScore] = []
    relevant: list[NodeWithScore] = []
    for round_number in range(ROUNDS):
        if round_number > 0:
            query = f"{query} {await rephrase(query)}"
        candidates = await search(query, seen)
        seen |= {node.node_id for node in candidates}
        relevant += await rerank(question, candidates)
        if len(relevant) >= ENOUGH:
            break
    return await write(question, relevant or candidates[:1])


if __name__ == "__main__":
    scepsy.instrument()
    print(asyncio.run(run(" ".join(sys.argv[1:]) or "Why do long bridges sway in the wind?")))

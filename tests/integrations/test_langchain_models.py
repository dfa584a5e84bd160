import asyncio

import openai
import pytest
from langchain_core.documents import Document
from langchain_core.documents.compressor import BaseDocumentCompressor
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

import scepsy
from scepsy import semconv


class Local(Embeddings):
    """An embedding of another server or of this process: no request is seen."""

    model_name = "local"

    def embed_documents(self, texts):
        if texts == ["bad"]:
            raise ValueError("a secret text")
        return [[float(len(text))] for text in texts]

    def embed_query(self, text):
        return self.embed_documents([text])[0]


class Waiting(Local):
    async def aembed_query(self, text):
        await asyncio.sleep(60)


class Wrapper(Embeddings):
    """As caches are: it names no model of its own."""

    def __init__(self, inner):
        self.inner = inner

    def embed_documents(self, texts):
        return self.inner.embed_documents(texts)

    def embed_query(self, text):
        return self.inner.embed_query(text)


def openai_embeddings(server, **more):
    return OpenAIEmbeddings(
        model="e",
        base_url=server.url,
        api_key="key",
        check_embedding_ctx_length=False,
        **server.http_clients(),
        **more,
    )


async def ways_to_embed(embeddings):
    embeddings.embed_documents(["a", "b"])
    embeddings.embed_query("a")
    await embeddings.aembed_documents(["a", "b"])
    await embeddings.aembed_query("a")


async def test_an_embedding_is_a_call_whichever_way(recorded):
    await ways_to_embed(Local())
    assert [call.name for call in recorded.calls] == ["embeddings local"] * 4
    assert len(recorded.spans) == 4


async def test_an_embedding_and_its_request_are_one_call(recorded, server):
    await ways_to_embed(openai_embeddings(server))
    assert [call.name for call in recorded.calls] == ["embeddings e"] * 4
    assert len(recorded.spans) == len(server.good) == 4
    for call, seen in zip(recorded.calls, server.good, strict=True):
        assert call.attributes[semconv.INPUT_TOKENS] == 9
        assert int(seen.headers["traceparent"].split("-")[2], 16) == call.context.span_id


def test_each_request_of_a_large_embedding_is_a_call(recorded, server):
    openai_embeddings(server, chunk_size=2).embed_documents(["a", "b", "c", "d", "e"])
    assert len(recorded.calls) == len(server.good) == 3
    assert {call.parent for call in recorded.calls} == {None}


def test_what_names_no_model_is_no_call(recorded):
    DeterministicFakeEmbedding(size=3).embed_query("a")
    Wrapper(Local()).embed_query("a")
    assert [call.name for call in recorded.calls] == ["embeddings local"]
    assert len(recorded.spans) == 1


def test_a_retrievers_embedding_has_its_role(recorded):
    store = InMemoryVectorStore(Local())
    store.add_texts(["aa"])
    recorded.clear()

    @scepsy.workflow
    def ask():
        return store.as_retriever().invoke("a")

    assert [found.page_content for found in ask()] == ["aa"]
    assert recorded.path(recorded.call) == ["invoke_workflow ask", "VectorStoreRetriever", "embeddings local"]
    assert recorded.call.attributes[semconv.ROLE] == "VectorStoreRetriever"


def test_an_embedding_that_fails(recorded):
    with pytest.raises(ValueError, match="secret"):
        Local().embed_query("bad")
    assert recorded.call.attributes[semconv.ERROR_TYPE] == "ValueError"
    assert "secret" not in recorded.call.to_json()


async def test_an_embedding_that_is_cancelled(recorded):
    task = asyncio.create_task(Waiting().aembed_query("a"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorded.call.attributes[semconv.OUTCOME] == "cancelled"


def test_a_class_made_later_is_hooked_and_all_are_restored(recorded):
    class Later(Embeddings):
        model = "later"

        def embed_documents(self, texts):
            return [[0.0] for _ in texts]

        def embed_query(self, text):
            return super().embed_query(text) or [0.0]

    Later().embed_query("a")
    assert recorded.call.name == "embeddings later"
    scepsy.uninstrument()
    for kind in (Embeddings, Local, Later, OpenAIEmbeddings):
        for name in ("embed_documents", "embed_query", "aembed_documents", "aembed_query", "__init_subclass__"):
            assert not hasattr(vars(kind).get(name), "_scepsy_original")
    assert "__init_subclass__" not in vars(Embeddings)
    Later().embed_query("a")
    assert len(recorded.spans) == 1


def test_who_wraps_a_hooked_method_keeps_it(recorded):
    hooked = Local.embed_query
    calls = []

    def wrapping(self, text):
        calls.append(text)
        return hooked(self, text)

    Local.embed_query = wrapping
    try:
        scepsy.uninstrument()
        assert Local.embed_query is wrapping
        Local().embed_query("a")
        assert calls == ["a"]
        assert recorded.spans == []
    finally:
        Local.embed_query = hooked.__wrapped__


class Reranker(BaseDocumentCompressor):
    """Asks vLLM's own reranking endpoint."""

    url: str

    def compress_documents(self, documents, query, callbacks=None):
        with openai.OpenAI(base_url=self.url, api_key="key") as client:
            client.post("/rerank", body={"model": "bge", "query": query, "documents": []}, cast_to=object)
        return documents[:1]


class Filter(BaseDocumentCompressor):
    """Asks a chat model."""

    url: str
    clients: dict

    async def acompress_documents(self, documents, query, callbacks=None):
        model = ChatOpenAI(model="m", base_url=self.url, api_key="key", **self.clients)
        await model.ainvoke(query)
        return documents

    def compress_documents(self, documents, query, callbacks=None):
        raise NotImplementedError


async def test_calls_of_compressors_have_their_name_as_role(recorded, server):
    documents = [Document("a"), Document("b")]
    rerank = RunnableLambda(lambda found: Reranker(url=server.url).compress_documents(found, "q"))

    @scepsy.workflow
    async def ask():
        kept = rerank.invoke(documents)
        await Reranker(url=server.url).acompress_documents(documents, "q")
        await Filter(url=server.url, clients=server.http_clients()).acompress_documents(documents, "q")
        return kept

    assert len(await ask()) == 1
    assert recorded.roles == ["Filter", "Reranker", "Reranker"]
    assert [recorded.path(call)[-2:] for call in recorded.calls] == [
        ["Reranker", "rerank bge"],
        ["Reranker", "rerank bge"],
        ["Filter", "chat m"],
    ]

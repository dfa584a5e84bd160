"""One program on three frameworks, run under one instrumentation; its spans go into a file of OTLP/JSON lines.

    python program.py INSTRUMENTATION OUT.jsonl

The server that it asks lives in the same process and takes two seconds for each answer, so that two runs agree in
their durations. Everything is run once before the instrumentation is turned on, so that no time goes into first uses.
"""

import asyncio
import base64
import contextlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FIRST_TOKEN_S = 0.4
LAST_TOKEN_S = 2.0
TOKENS = 12


class Model(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that takes its time."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        begin = time.perf_counter()
        content = self.rfile.read(int(self.headers["content-length"]))
        if not self.path.endswith(("/completions", "/embeddings")):
            return self.answer({})  # somebody's telemetry
        body = json.loads(content)
        if body["model"] == "missing":
            return self.answer({"error": {"message": "no such model", "code": 404}}, status=404)
        prompt = json.dumps(body.get("messages") or body.get("input") or body.get("prompt"))
        usage = {"prompt_tokens": len(prompt), "completion_tokens": TOKENS, "total_tokens": len(prompt) + TOKENS}
        if self.path.endswith("/embeddings"):
            vector = {"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}
            self.sleep_until(begin + LAST_TOKEN_S)
            del usage["completion_tokens"]
            return self.answer({"object": "list", "model": body["model"], "data": [vector], "usage": usage})
        if body.get("stream"):
            return self.stream(body, usage, begin)
        self.sleep_until(begin + LAST_TOKEN_S)
        message = {"role": "assistant", "content": "word " * TOKENS}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return self.answer({**self.head(body), "object": "chat.completion", "choices": [choice], "usage": usage})

    def head(self, body):
        Model.number += 1
        return {"id": f"chatcmpl-{Model.number}", "created": 1, "model": body["model"]}

    number = 0

    def stream(self, body, usage, begin):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        head = {**self.head(body), "object": "chat.completion.chunk"}
        for index in range(TOKENS):
            part = (LAST_TOKEN_S - FIRST_TOKEN_S) * index / (TOKENS - 1)
            self.sleep_until(begin + FIRST_TOKEN_S + part)
            finish = "stop" if index == TOKENS - 1 else None
            choice = {"index": 0, "delta": {"role": "assistant", "content": "word "}, "finish_reason": finish}
            self.chunk({**head, "choices": [choice]})
        if (body.get("stream_options") or {}).get("include_usage"):
            self.chunk({**head, "choices": [], "usage": usage})
        self.write(b"data: [DONE]\n\n")
        self.write(b"")

    def chunk(self, value):
        self.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def write(self, data):
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @staticmethod
    def sleep_until(moment):
        time.sleep(max(0.0, moment - time.perf_counter()))

    def log_message(self, *arguments):
        pass


def langchain_part(config):
    """A chain that asks two models at once, then streams a third answer."""
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnableLambda, RunnableParallel
    from langchain_openai import ChatOpenAI

    planner, critic, writer = ChatOpenAI(model="planner"), ChatOpenAI(model="critic"), ChatOpenAI(model="writer")

    def answer(question, config):
        prompt = ChatPromptTemplate.from_template("Think about {question}")
        both = RunnableParallel(first=prompt | planner, second=prompt | critic)
        both.invoke({"question": question}, config)
        return "".join(str(chunk.content) for chunk in writer.stream(f"Write of {question}", config, stream_usage=True))

    return RunnableLambda(answer).invoke("tides", {**config, "run_name": "answer"})


def llama_index_part():
    """A query engine that asks one model, then streams another's answer."""
    from llama_index.core.llms import LLM
    from llama_index.core.query_engine import CustomQueryEngine
    from llama_index.llms.openai_like import OpenAILike

    def model(name, **more):
        given = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": "none", "is_chat_model": True}
        return OpenAILike(model=name, **given, **more)

    class Engine(CustomQueryEngine):
        planner: LLM
        writer: LLM

        def custom_query(self, query_str):
            thought = self.planner.complete(f"Think about {query_str}").text
            return [part.text for part in self.writer.stream_complete(f"Write of {query_str} by {thought}")][-1]

    usage = {"stream_options": {"include_usage": True}}
    return str(Engine(planner=model("planner"), writer=model("writer", additional_kwargs=usage)).query("tides"))


def openai_part(root, sync_client, async_client):
    """Plain, streamed, concurrent, embedded and failed calls of the client, under a span of the user's own."""
    import openai

    client = sync_client(max_retries=0)

    def ask(model, words, **more):
        return client.chat.completions.create(model=model, messages=[{"role": "user", "content": words}], **more)

    async def both():
        async with async_client() as other:
            messages = [{"role": "user", "content": "At once"}]
            await asyncio.gather(
                other.chat.completions.create(model="planner", messages=messages),
                other.chat.completions.create(model="critic", messages=messages),
            )

    def answer():
        ask("planner", "Think")
        for _ in ask("writer", "Write", stream=True, stream_options={"include_usage": True}):
            pass
        asyncio.run(both())
        client.embeddings.create(model="embedder", input="some words", encoding_format="float")
        with contextlib.suppress(openai.NotFoundError):
            ask("missing", "Fail")

    root("plain client", answer)
    client.close()


def exporting_provider():
    """A provider of OpenTelemetry's SDK, and the spans that it has ended."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider, exporter


def write(spans, out):
    """The spans as OTLP/JSON, one line for each, in the order of their ends."""
    from google.protobuf.json_format import MessageToDict
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    with Path(out).open("w", encoding="utf-8") as file:
        for each in sorted(spans, key=lambda each: each.end_time):
            request = MessageToDict(encode_spans([each]))
            span = request["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
            for key in ("traceId", "spanId", "parentSpanId"):
                if key in span:
                    span[key] = base64.b64decode(span[key]).hex()
            # What protobuf's JSON calls by name, OTLP's has as a number.
            span["kind"] = 1 + ["INTERNAL", "SERVER", "CLIENT"].index(span["kind"].removeprefix("SPAN_KIND_"))
            if "code" in span["status"]:
                span["status"] = {"code": 2 if span["status"]["code"] == "STATUS_CODE_ERROR" else 1}
            request["resourceSpans"][0]["resource"] = {}
            for event in span.get("events", ()):
                # Stack traces name the machine that they were made on.
                event["attributes"] = [
                    pair for pair in event.get("attributes", ()) if pair["key"] != "exception.stacktrace"
                ]
            file.write(json.dumps(request, separators=(",", ":")) + "\n")


def instrument(name, out):
    """Turn an instrumentation on. Returns its client classes, LangChain configuration, root span and writer."""
    import openai

    classes, config = (openai.OpenAI, openai.AsyncOpenAI), {}
    if name == "scepsy":
        import scepsy

        directory = Path(out).with_suffix("")
        scepsy.instrument(directory=directory)

        def save():
            scepsy.uninstrument()
            (only,) = directory.glob("*.jsonl")
            only.rename(out)
            directory.rmdir()

        return classes, config, lambda title, body: scepsy.workflow(name=title)(body)(), save
    provider, exporter = exporting_provider()
    name, _, beside = name.partition("+")
    if beside:
        # On the same provider, as for a collector that gets everything.
        import scepsy

        scepsy.instrument(provider=provider)
    if name == "openinference":
        from openinference.instrumentation.langchain import LangChainInstrumentor
        from openinference.instrumentation.llama_index import LlamaIndexInstrumentor
        from openinference.instrumentation.openai import OpenAIInstrumentor
    elif name == "traceloop":
        from opentelemetry.instrumentation.langchain import LangchainInstrumentor as LangChainInstrumentor
        from opentelemetry.instrumentation.llamaindex import LlamaIndexInstrumentor
        from opentelemetry.instrumentation.openai import OpenAIInstrumentor
    elif name == "opentelemetry":
        from opentelemetry.instrumentation.genai.langchain import LangChainInstrumentor
        from opentelemetry.instrumentation.genai.llama_index import LlamaIndexInstrumentor
        from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor
    elif name == "langfuse":
        from langfuse import Langfuse
        from langfuse.langchain import CallbackHandler
        from langfuse.openai import AsyncOpenAI, OpenAI

        os.environ |= {"LANGFUSE_PUBLIC_KEY": "pk", "LANGFUSE_SECRET_KEY": "sk"}
        Langfuse(base_url=os.environ["OPENAI_BASE_URL"], tracer_provider=provider)
        classes, config = (OpenAI, AsyncOpenAI), {"callbacks": [CallbackHandler()]}
    if name != "langfuse":
        for hook in (LangChainInstrumentor, LlamaIndexInstrumentor, OpenAIInstrumentor):
            hook().instrument(tracer_provider=provider)
    tracer = provider.get_tracer("the user's own")

    def save():
        time.sleep(2)  # some of them end streamed spans on a thread, a while later
        write(exporter.get_finished_spans(), out)

    if beside:
        return classes, config, lambda title, body: scepsy.workflow(name=title)(body)(), save

    def root(title, body):
        with tracer.start_as_current_span(title):
            body()

    return classes, config, root, save


def main(name, out):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1", "OPENAI_API_KEY": "none"}

    def no_root(title, body):
        body()

    def play(classes, config, root):
        langchain_part(config)
        if not name.startswith("langfuse"):
            llama_index_part()
        openai_part(root, *classes)

    import openai

    play((openai.OpenAI, openai.AsyncOpenAI), {}, no_root)
    classes, config, root, save = instrument(name, out)
    play(classes, config, root)
    save()
    os._exit(0)  # exporters of their own would go on trying


if __name__ == "__main__":
    main(*sys.argv[1:])

import asyncio
import operator
from importlib.metadata import version
from typing import Annotated, TypedDict

import openai
import pytest
from langchain_core.language_models import FakeListChatModel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt

import scepsy
from scepsy import semconv

# Before that version nothing tells a graph from a chain.
MARKS_ITS_GRAPHS = tuple(map(int, version("langgraph").split(".")[:2])) >= (1, 2)
MODEL = FakeListChatModel(responses=["answer"] * 1000)
CALL = ("chat FakeListChatModel", [])


class State(TypedDict):
    items: Annotated[list, operator.add]


def work(state):
    MODEL.invoke("x")
    return {"items": ["done"]}


async def awork(state):
    await MODEL.ainvoke("x")
    return {"items": ["done"]}


def fan_out(worker=work, width=3):
    graph = StateGraph(State)
    graph.add_node("split", lambda state: {"items": []})
    graph.add_node("work", worker)
    graph.add_edge(START, "split")
    graph.add_conditional_edges("split", lambda state: [Send("work", {"items": [i]}) for i in range(width)], ["work"])
    graph.add_edge("work", END)
    return graph


def steps(recorded):
    """The tree without runs that hold nothing."""

    def prune(nodes):
        kept = ((name, prune(below)) for name, below in nodes)
        return [(name, below) for name, below in kept if below or name.startswith("chat")]

    return prune(recorded.tree)


def test_nodes_and_send(recorded):
    fan_out().compile().invoke({"items": []})
    assert steps(recorded) == [("invoke_workflow LangGraph", [("work", [CALL])] * 3)]
    assert recorded.roles == ["work"] * 3


async def test_nodes_and_send_async(recorded):
    await fan_out(awork).compile().ainvoke({"items": []})
    assert steps(recorded) == [("invoke_workflow LangGraph", [("work", [CALL])] * 3)]


async def test_streamed_graphs(recorded):
    async for _ in fan_out(awork).compile().astream({"items": []}):
        assert scepsy.capture.recorder.around() == (None, None)
    assert steps(recorded) == [("invoke_workflow LangGraph", [("work", [CALL])] * 3)]


def test_a_raw_client_in_a_node_is_a_child_of_the_node(recorded, server):
    client = openai.OpenAI(base_url=server.url, api_key="key")

    def ask(state):
        client.chat.completions.create(model="raw", messages=[])
        return {"items": []}

    fan_out(ask).compile().invoke({"items": []})
    assert steps(recorded) == [("invoke_workflow LangGraph", [("work", [("chat raw", [])])] * 3)]
    assert len(server.good) == 3
    client.close()


def test_subgraphs_and_recursion(recorded):
    inner = fan_out(width=1).compile(name="inner")

    def recurse(state):
        if "deeper" not in state["items"]:
            outer.invoke({"items": ["deeper"]})
        return {"items": []}

    graph = StateGraph(State)
    graph.add_node("sub", inner)
    graph.add_node("recurse", recurse)
    graph.add_edge(START, "sub")
    graph.add_edge("sub", "recurse")
    outer = graph.compile(name="outer")
    outer.invoke({"items": []})
    sub = ("sub", [("inner", [("work", [CALL])])])
    assert steps(recorded) == [("invoke_workflow outer", [sub, ("recurse", [("outer", [sub])])])]


def test_a_named_graph_inside_a_workflow_is_an_agent(recorded):
    @scepsy.workflow
    def main():
        fan_out(width=1).compile(name="researcher").invoke({"items": []})

    main()
    name = "invoke_agent researcher" if MARKS_ITS_GRAPHS else "researcher"
    assert steps(recorded) == [("invoke_workflow main", [(name, [("work", [CALL])])])]


def test_a_prebuilt_agent_gives_its_own_name_as_role(recorded):
    graph = StateGraph(State)
    graph.add_node("agent", work)
    graph.add_edge(START, "agent")
    graph.compile(name="bob").invoke({"items": []})
    assert recorded.roles == ["bob"]


def test_an_interrupt_is_no_error_and_the_thread_is_known(recorded):
    def ask(state):
        MODEL.invoke("x")
        return {"items": [interrupt("may I?")]}

    graph = StateGraph(State)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    app = graph.compile(checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "t1"}}
    app.invoke({"items": []}, config)
    app.invoke(Command(resume="yes"), config)
    first, second = [span for span in recorded.spans if span.parent is None]
    assert {span.attributes[semconv.CONVERSATION_ID] for span in (first, second)} == {"t1"}
    asked = [span for span in recorded.spans if span.name == "ask"]
    assert asked[0].attributes[semconv.OUTCOME] == "interrupted"
    assert all(span.status.is_ok or span.status.is_unset for span in recorded.spans)
    assert len(recorded.calls) == 2


def test_a_handover_to_the_parent_graph_is_no_error(recorded):
    inner = StateGraph(State)
    inner.add_node("leave", lambda state: Command(goto="other", graph=Command.PARENT, update={"items": []}))
    inner.add_edge(START, "leave")
    graph = StateGraph(State)
    graph.add_node("sub", inner.compile(), destinations=("other",))
    graph.add_node("other", work)
    graph.add_edge(START, "sub")
    graph.compile().invoke({"items": []})
    assert all(span.status.is_ok or span.status.is_unset for span in recorded.spans)
    assert recorded.roles == ["other"]


def test_a_node_that_fails(recorded):
    def fail(state):
        MODEL.invoke("x")
        raise ValueError("a secret")

    graph = StateGraph(State)
    graph.add_node("fail", fail)
    graph.add_edge(START, "fail")
    with pytest.raises(ValueError, match="a secret"):
        graph.compile().invoke({"items": []})
    assert recorded.named("fail").attributes[semconv.ERROR_TYPE] == "ValueError"
    assert recorded.call.status.is_unset
    assert not any("secret" in span.to_json() for span in recorded.spans)


async def test_fifty_graphs_at_once_with_some_cancelled(recorded):
    async def slow(state):
        await asyncio.sleep(0.02)
        await MODEL.ainvoke("x")
        return {"items": []}

    app = fan_out(slow).compile()

    async def run(index):
        await asyncio.wait_for(app.ainvoke({"items": []}), 0.001 if index % 5 == 0 else 20)

    await asyncio.gather(*(run(index) for index in range(50)), return_exceptions=True)
    assert len(recorded.calls) == 120
    assert all(recorded.path(call)[0] == "invoke_workflow LangGraph" for call in recorded.calls)

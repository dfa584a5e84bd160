"""LangChain's runs as handles: what each is, below what it hangs, and when it is over."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from langchain_core.runnables.config import var_child_runnable_config

from scepsy import semconv
from scepsy.capture import Handle, end_call, guard_task, how_ended, muted, note_content, recorder, settings, settle_task
from scepsy_integrations.langchain.answers import describe
from scepsy_integrations.langchain.content import answers

if TYPE_CHECKING:
    from langchain_core.outputs import LLMResult

Known = dict[str, Any]
"""What LangChain tells of a run beside its input."""

_HIDDEN_TAG: Final = "langsmith:hidden"
_PURE_RUN_TYPES: Final = frozenset({"prompt", "parser"})
_PREBUILT_NODES: Final = frozenset({"agent", "model", "call_model"})
_NAMED_GRAPHS: Final = frozenset({semconv.KIND_AGENT, semconv.KIND_WORKFLOW})
_ALIAS_LIMIT: Final = 10_000
_NOTHING: Final[Known] = {}


class _Link:
    """A model or retriever run in the context that it was started in, and the link that was there before.

    `task` is the asyncio task that awaits it, if one does.
    """

    __slots__ = ("before", "handle", "task")

    def __init__(self, handle: Handle, task: Any, before: _Link | None) -> None:
        self.handle = handle
        self.task = task
        self.before = before


_passed: Final[OrderedDict[UUID, Handle | None]] = OrderedDict()
"""Runs without a span of their own (prompts, parsers, hidden plumbing), and the handle above each."""
_innermost: ContextVar[_Link | None] = ContextVar("scepsy_langchain_run", default=None)


def start_chain(
    run_id: UUID,
    parent_run_id: UUID | None,
    serialized: Known | None,
    tags: list[str] | None,
    metadata: Known | None,
    told: Known,
) -> None:
    """A chain, graph or node starts."""
    if run_id.int in recorder.open or muted():
        return
    given = _find(parent_run_id)
    if told.get("run_type") in _PURE_RUN_TYPES or (tags and _HIDDEN_TAG in tags):
        _pass(run_id, given)
        return
    name = _name(serialized, told, "chain")
    known = metadata or _NOTHING
    node = known.get("langgraph_node")
    generic = name.startswith("Runnable") or name == "LangGraph"
    parent, outer = recorder.around(given)
    if parent is None:
        handle = recorder.start_below(None, outer, semconv.KIND_WORKFLOW, name, key=run_id.int, named=not generic)
        _note_conversation(handle, known)
        return
    named = name == node if node is not None else not generic
    if named and node in _PREBUILT_NODES and parent.role and parent.kind in _NAMED_GRAPHS:
        named = False  # every prebuilt agent has these nodes: its own name tells more
    kind = semconv.KIND_STEP
    if named and name != node and known.get("ls_integration") == "langgraph":
        kind = semconv.KIND_AGENT
    handle = recorder.start_below(parent, outer, kind, name, key=run_id.int, named=named)
    if named and known.get("lc_agent_name"):
        handle.role = known["lc_agent_name"]


def start_tool(run_id: UUID, parent_run_id: UUID | None, serialized: Known | None, told: Known) -> None:
    """A tool starts."""
    if run_id.int not in recorder.open and not muted():
        name = _name(serialized, told, "tool")
        recorder.start(semconv.KIND_TOOL, name, key=run_id.int, parent=_find(parent_run_id))


def start_retriever(run_id: UUID, parent_run_id: UUID | None, serialized: Known | None, told: Known) -> None:
    """A retriever starts."""
    if run_id.int in recorder.open or muted():
        return
    name = _name(serialized, told, "retriever")
    handle = recorder.start(
        semconv.KIND_STEP, name, operation=semconv.RETRIEVAL, key=run_id.int, parent=_find(parent_run_id)
    )
    _link(handle, None)


def start_call(
    operation: str,
    run_id: UUID,
    parent_run_id: UUID | None,
    serialized: Known | None,
    metadata: Known | None,
    told: Known,
    task: asyncio.Task[Any] | None,
) -> Handle | None:
    """A model is called; None if this is known already. `task` is what awaits it, if it is asynchronous."""
    if run_id.int in recorder.open or muted():
        return None
    known = metadata or _NOTHING
    model = known.get("ls_model_name")
    if not model:
        parameters = told.get("invocation_params") or _NOTHING
        model = parameters.get("model") or parameters.get("model_name") or _name(serialized, _NOTHING, "")
    given = _find(parent_run_id)
    wrapping = _wrapping_call(told.get("batch_size") or 1, task)
    if wrapping is not None and (given is None or wrapping.start_ns > given.start_ns):
        given = wrapping
    parent, outer = recorder.around(given, without=enclosing_call)
    handle = recorder.start_below(parent, outer, semconv.KIND_LLM, str(model), operation=operation, key=run_id.int)
    provider = known.get("ls_provider")
    if provider:
        handle.attributes[semconv.PROVIDER] = str(provider)
    if handle.parent is None:
        _note_conversation(handle, known)
    _link(handle, task)
    guard_task(handle)
    return handle


def end_run(run_id: UUID, error: BaseException | None = None) -> None:
    """A chain, graph, node, tool or retriever has ended; with an error it has failed, was cancelled or interrupted."""
    handle = recorder.open.get(run_id.int)
    if handle is None:
        _passed.pop(run_id, None)
        return
    settle_task(handle)
    handle.end(error=error, outcome=how_ended(error))


def receive(run_id: UUID) -> None:
    """A piece of a streamed answer has come."""
    handle = recorder.open.get(run_id.int)
    if handle is not None:
        handle.received()


def receive_event(run_id: UUID, event: Any) -> None:
    """An event of a streamed answer has come: a piece, or what frames them."""
    if event.get("event") == "content-block-delta":
        receive(run_id)


def finish_call(run_id: UUID, response: LLMResult) -> None:
    """A model has answered."""
    handle = recorder.open.get(run_id.int)
    if handle is None:
        return
    try:
        describe(handle, response)
        if settings.record_content and handle.kind == semconv.KIND_LLM:
            note_content(handle, semconv.OUTPUT_MESSAGES, lambda: answers(response))
    finally:
        end_call(handle)


def fail_call(run_id: UUID, error: BaseException) -> None:
    """A call has failed, or its stream was given up."""
    handle = recorder.open.get(run_id.int)
    if handle is not None:
        end_call(handle, error)


def enclosing_chain() -> Handle | None:
    """The chain, node or tool run around the caller, as LangChain's own context variable names it."""
    config = var_child_runnable_config.get()
    return None if config is None else _find(getattr(config.get("callbacks"), "parent_run_id", None))


def enclosing_call() -> Handle | None:
    """The model or retriever run around the caller.

    It is known only from the link that its start has left in the context, where the code that reads a model's stream
    sees it as well: so a model counts only until its first piece has come, for nobody reads before that.
    """
    link = _open_link()
    if link is None:
        return None
    if link.handle.accepting:
        # Several calls of one batch are opened before the first is sent; they are sent in their order.
        before = link.before
        while before is not None and before.handle.accepting and before.handle.parent is link.handle.parent:
            link, before = before, before.before
    return link.handle


def look_around() -> None:
    """Let every call of the process look for a run of LangChain's around it."""
    if enclosing_chain not in recorder.sources:
        recorder.sources += [enclosing_chain, enclosing_call]


def _find(run_id: UUID | None) -> Handle | None:
    if run_id is None:
        return None
    return recorder.open.get(run_id.int) or _passed.get(run_id)


def _pass(run_id: UUID, above: Handle | None) -> None:
    _passed[run_id] = above
    if len(_passed) > _ALIAS_LIMIT:
        _passed.popitem(last=False)


def _name(serialized: Known | None, told: Known, otherwise: str) -> str:
    name = told.get("name")
    if not name and serialized:
        name = serialized.get("name") or (serialized.get("id") or [None])[-1]
    return str(name or otherwise)


def _note_conversation(handle: Handle, metadata: Known) -> None:
    thread = metadata.get("thread_id")
    if thread is not None:
        handle.attributes[semconv.CONVERSATION_ID] = str(thread)


def _link(handle: Handle, task: asyncio.Task[Any] | None) -> None:
    before = _innermost.get()
    while before is not None and not before.handle.live:
        before = before.before
    _innermost.set(_Link(handle, task, before))


def _open_link() -> _Link | None:
    link = _innermost.get()
    while link is not None and (not link.handle.live or link.handle.first_ns is not None):
        link = link.before
    return link


def _wrapping_call(batch_size: int, task: asyncio.Task[Any] | None) -> Handle | None:
    """The model run that a model run starting now is part of.

    One of the same batch is not, nor is one that was awaited by this very task: that one was given up.
    """
    link = _open_link()
    if link is None or batch_size > 1 or (task is not None and link.task is task):
        return None
    return link.handle

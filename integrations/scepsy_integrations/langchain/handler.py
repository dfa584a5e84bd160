"""LangChain's callbacks, turned into handles.

The handler runs inline, in the task and thread of the run itself: what it sets in a context variable is seen by the
code below the run, and timestamps are not those of another thread's queue.
"""

# ruff: noqa: ARG002 - LangChain fixes the signatures
from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables.config import var_child_runnable_config

if TYPE_CHECKING:
    from langchain_core.outputs import LLMResult

from scepsy import semconv
from scepsy.capture import (
    Handle,
    end_call,
    guard_task,
    harmless,
    how_ended,
    message,
    muted,
    note_content,
    recorder,
    settings,
    settle_task,
    text_parts,
)
from scepsy_integrations.langchain.content import answers, said

_HIDDEN_TAG: Final = "langsmith:hidden"
_PURE_RUN_TYPES: Final = frozenset({"prompt", "parser"})
_PREBUILT_NODES: Final = frozenset({"agent", "model", "call_model"})
_NAMED_GRAPHS: Final = frozenset({semconv.KIND_AGENT, semconv.KIND_WORKFLOW})
_ALIAS_LIMIT: Final = 10_000


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


class ScepsyCallbackHandler(BaseCallbackHandler):
    """Captures LangChain and LangGraph runs: pass it in `callbacks=[...]`, or let `scepsy.instrument()` do it."""

    run_inline = True
    ignore_retry = True
    ignore_custom_event = True

    def __init__(self) -> None:
        if _enclosing_chain not in recorder.sources:
            recorder.sources += [_enclosing_chain, _enclosing_call]

    @harmless
    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A chain, graph or node starts."""
        if run_id.int in recorder.open or muted():
            return
        given = _find(parent_run_id)
        if kwargs.get("run_type") in _PURE_RUN_TYPES or (tags and _HIDDEN_TAG in tags):
            _pass(run_id, given)
            return
        name = _name(serialized, kwargs, "chain")
        known = metadata or {}
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

    @harmless
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A chain, graph or node has ended."""
        _end(run_id, None)

    @harmless
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A chain, graph or node has failed, was cancelled or interrupted."""
        _end(run_id, error)

    @harmless
    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """A tool starts."""
        if run_id.int not in recorder.open and not muted():
            name = _name(serialized, kwargs, "tool")
            recorder.start(semconv.KIND_TOOL, name, key=run_id.int, parent=_find(parent_run_id))

    @harmless
    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A tool has ended."""
        _end(run_id, None)

    @harmless
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A tool has failed."""
        _end(run_id, error)

    @harmless
    def on_retriever_start(
        self,
        serialized: dict[str, Any] | None,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """A retriever starts."""
        if run_id.int in recorder.open or muted():
            return
        name = _name(serialized, kwargs, "retriever")
        handle = recorder.start(
            semconv.KIND_STEP, name, operation=semconv.RETRIEVAL, key=run_id.int, parent=_find(parent_run_id)
        )
        _link(handle)

    @harmless
    def on_retriever_end(self, documents: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A retriever has ended."""
        _end(run_id, None)

    @harmless
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A retriever has failed."""
        _end(run_id, error)

    @harmless
    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """A chat model is called."""
        handle = _start_call(semconv.CHAT, serialized, run_id, parent_run_id, kwargs)
        if handle is not None and settings.record_content:
            note_content(handle, semconv.INPUT_MESSAGES, lambda: [said(one) for one in messages[0]])

    @harmless
    def on_llm_start(
        self,
        serialized: dict[str, Any] | None,
        prompts: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """A completion model is called."""
        handle = _start_call(semconv.TEXT_COMPLETION, serialized, run_id, parent_run_id, kwargs)
        if handle is not None and settings.record_content:
            note_content(handle, semconv.INPUT_MESSAGES, lambda: [message("user", text_parts(one)) for one in prompts])

    @harmless
    def on_llm_new_token(self, token: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A piece of a streamed answer has come."""
        handle = recorder.open.get(run_id.int)
        if handle is not None:
            handle.received()

    @harmless
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """A model has answered."""
        handle = recorder.open.get(run_id.int)
        if handle is not None:
            try:
                _describe(handle, response)
                if settings.record_content and handle.kind == semconv.KIND_LLM:
                    note_content(handle, semconv.OUTPUT_MESSAGES, lambda: answers(response))
            finally:
                end_call(handle)

    @harmless
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A call has failed, or its stream was given up."""
        handle = recorder.open.get(run_id.int)
        if handle is not None:
            end_call(handle, error)


def _start_call(
    operation: str,
    serialized: dict[str, Any] | None,
    run_id: UUID,
    parent_run_id: UUID | None,
    kwargs: dict[str, Any],
) -> Handle | None:
    if run_id.int in recorder.open or muted():
        return None
    metadata = kwargs.get("metadata") or {}
    parameters = kwargs.get("invocation_params") or {}
    model = (
        metadata.get("ls_model_name")
        or parameters.get("model")
        or parameters.get("model_name")
        or _name(serialized, {}, "")
    )
    task = _awaiting_task()
    given = _find(parent_run_id)
    wrapping = _wrapping_call(kwargs.get("batch_size") or 1, task)
    if wrapping is not None and (given is None or wrapping.start_ns > given.start_ns):
        given = wrapping
    parent, outer = recorder.around(given, without=_enclosing_call)
    handle = recorder.start_below(parent, outer, semconv.KIND_LLM, str(model), operation=operation, key=run_id.int)
    provider = metadata.get("ls_provider")
    if provider:
        handle.attributes[semconv.PROVIDER] = str(provider)
    if handle.parent is None:
        _note_conversation(handle, metadata)
    _link(handle, task)
    guard_task(handle)
    return handle


def _end(run_id: UUID, error: BaseException | None) -> None:
    handle = recorder.open.get(run_id.int)
    if handle is None:
        _passed.pop(run_id, None)
        return
    settle_task(handle)
    outcome = how_ended(error)
    handle.end(error=error, outcome=outcome)


def _find(run_id: UUID | None) -> Handle | None:
    if run_id is None:
        return None
    return recorder.open.get(run_id.int) or _passed.get(run_id)


def _pass(run_id: UUID, above: Handle | None) -> None:
    _passed[run_id] = above
    if len(_passed) > _ALIAS_LIMIT:
        _passed.popitem(last=False)


def _name(serialized: dict[str, Any] | None, kwargs: dict[str, Any], otherwise: str) -> str:
    name = kwargs.get("name")
    if not name and serialized:
        name = serialized.get("name") or (serialized.get("id") or [None])[-1]
    return str(name or otherwise)


def _note_conversation(handle: Handle, metadata: dict[str, Any]) -> None:
    thread = metadata.get("thread_id")
    if thread is not None:
        handle.attributes[semconv.CONVERSATION_ID] = str(thread)


def _describe(handle: Handle, response: LLMResult) -> None:
    """Note tokens and identity, unless the server itself has told them already."""
    if handle.kind != semconv.KIND_LLM:
        return
    attributes = handle.attributes
    message = None
    if response.generations and response.generations[0]:
        message = getattr(response.generations[0][0], "message", None)
    output: dict[str, Any] = response.llm_output or {}
    usage = getattr(message, "usage_metadata", None)
    if usage:
        if usage.get("total_cost") == 0 and not output:  # LangChain's mark of an answer from its own cache
            attributes[semconv.CACHE_HIT] = True
        attributes.setdefault(semconv.INPUT_TOKENS, usage.get("input_tokens", 0))
        attributes.setdefault(semconv.OUTPUT_TOKENS, usage.get("output_tokens", 0))
        cached = (usage.get("input_token_details") or {}).get("cache_read")
        if cached is not None:
            attributes.setdefault(semconv.CACHED_TOKENS, cached)
        reasoning = (usage.get("output_token_details") or {}).get("reasoning")
        if reasoning is not None:
            attributes.setdefault(semconv.REASONING_TOKENS, reasoning)
    else:
        counts = output.get("token_usage") or {}
        if counts.get("prompt_tokens") is not None:
            attributes.setdefault(semconv.INPUT_TOKENS, counts["prompt_tokens"])
            attributes.setdefault(semconv.OUTPUT_TOKENS, counts.get("completion_tokens") or 0)
    about = getattr(message, "response_metadata", None) or output
    if about.get("model_name"):
        attributes.setdefault(semconv.RESPONSE_MODEL, str(about["model_name"]))
    if about.get("id"):
        attributes.setdefault(semconv.RESPONSE_ID, str(about["id"]))


def _link(handle: Handle, task: Any = None) -> None:
    before = _innermost.get()
    while before is not None and not before.handle.live:
        before = before.before
    _innermost.set(_Link(handle, task, before))


def _enclosing_chain() -> Handle | None:
    """The chain, node or tool run around the caller, as LangChain's own context variable names it."""
    config = var_child_runnable_config.get()
    return None if config is None else _find(getattr(config.get("callbacks"), "parent_run_id", None))


def _enclosing_call() -> Handle | None:
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


def _open_link() -> _Link | None:
    link = _innermost.get()
    while link is not None and (not link.handle.live or link.handle.first_ns is not None):
        link = link.before
    return link


def _wrapping_call(batch_size: int, task: Any) -> Handle | None:
    """The model run that a model run starting now is part of.

    One of the same batch is not, nor is one that was awaited by this very task: that one was given up.
    """
    link = _open_link()
    if link is None or batch_size > 1 or (task is not None and link.task is task):
        return None
    return link.handle


def _awaiting_task() -> Any:
    """The current task, if the callback comes from an asynchronous run: those answer in tasks of their own."""
    if not sys._getframe(4).f_code.co_name.startswith(("_ahandle", "ahandle")):  # noqa: SLF001 - the only way to know
        return None
    return asyncio.current_task()


_hook: Final[ContextVar[ScepsyCallbackHandler | None]] = ContextVar(
    "scepsy_langchain_handler",
    default=ScepsyCallbackHandler(),  # noqa: B039 - one handler for every context is what is wanted
)


def turn_on() -> None:
    """Give the handler to every run of the process from now on."""
    from langchain_core.tracers import context as tracing  # not above: waiting for its import is what calls this

    if not any(hook[0] is _hook for hook in tracing._configure_hooks):  # noqa: SLF001 - as below
        tracing.register_configure_hook(_hook, inheritable=True, handle_class=ScepsyCallbackHandler)


def turn_off() -> None:
    """Give it to none any more."""
    from langchain_core.tracers import context as tracing

    hooks = tracing._configure_hooks  # noqa: SLF001 - LangChain can register a hook, but not take it back
    hooks[:] = [hook for hook in hooks if hook[0] is not _hook]

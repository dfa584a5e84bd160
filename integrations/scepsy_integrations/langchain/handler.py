"""LangChain's callbacks, by the way that is cheapest here: straight from its managers, or as a handler among others.

Either way they come inline, in the task and thread of the run itself: what is set in a context variable then is seen by
the code below the run, and timestamps are not those of another thread's queue.
"""

# ruff: noqa: ARG002 - LangChain fixes the signatures
from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler

from scepsy import semconv
from scepsy.capture import Handle, harmless, message, note_content, settings, text_parts
from scepsy_integrations.langchain import runs
from scepsy_integrations.langchain.content import said
from scepsy_integrations.langchain.managers import Ending, Starting, hook_managers, restore_managers

if TYPE_CHECKING:
    from langchain_core.outputs import LLMResult


class ScepsyCallbackHandler(BaseCallbackHandler):
    """Captures LangChain and LangGraph runs: pass it in `callbacks=[...]`, or let `scepsy.instrument()` do it."""

    run_inline = True
    ignore_retry = True
    ignore_custom_event = True

    def __init__(self) -> None:
        runs.look_around()

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
        runs.start_chain(run_id, parent_run_id, serialized, tags, metadata, kwargs)

    @harmless
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A chain, graph or node has ended."""
        runs.end_run(run_id)

    @harmless
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A chain, graph or node has failed, was cancelled or interrupted."""
        runs.end_run(run_id, error)

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
        runs.start_tool(run_id, parent_run_id, serialized, kwargs)

    @harmless
    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A tool has ended."""
        runs.end_run(run_id)

    @harmless
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A tool has failed."""
        runs.end_run(run_id, error)

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
        runs.start_retriever(run_id, parent_run_id, serialized, kwargs)

    @harmless
    def on_retriever_end(self, documents: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A retriever has ended."""
        runs.end_run(run_id)

    @harmless
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A retriever has failed."""
        runs.end_run(run_id, error)

    @harmless
    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A chat model is called."""
        task = _awaiting_task()
        handle = runs.start_call(semconv.CHAT, run_id, parent_run_id, serialized, metadata, kwargs, task)
        _note_messages(handle, messages[0])

    @harmless
    def on_llm_start(
        self,
        serialized: dict[str, Any] | None,
        prompts: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A completion model is called."""
        task = _awaiting_task()
        handle = runs.start_call(semconv.TEXT_COMPLETION, run_id, parent_run_id, serialized, metadata, kwargs, task)
        _note_prompt(handle, prompts[0])

    @harmless
    def on_llm_new_token(self, token: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """A piece of a streamed answer has come."""
        runs.receive(run_id)

    @harmless
    def on_stream_event(self, event: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Something has come of an answer that is streamed as events, as newer LangChains can."""
        runs.receive_event(run_id, event)

    @harmless
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """A model has answered."""
        runs.finish_call(run_id, response)

    @harmless
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A call has failed, or its stream was given up."""
        runs.fail_call(run_id, error)


def _note_messages(handle: Handle | None, messages: Any) -> None:
    if handle is not None and settings.record_content:
        note_content(handle, semconv.INPUT_MESSAGES, lambda: [said(one) for one in messages])


def _note_prompt(handle: Handle | None, prompt: Any) -> None:
    if handle is not None and settings.record_content:
        note_content(handle, semconv.INPUT_MESSAGES, lambda: [message("user", text_parts(prompt))])


def _awaiting_task() -> asyncio.Task[Any] | None:
    """The current task, if the callback comes from an asynchronous run: those answer in tasks of their own."""
    if not sys._getframe(3).f_code.co_name.startswith(("_ahandle", "ahandle")):  # noqa: SLF001 - the only way to know
        return None
    return asyncio.current_task()


@harmless
def _chain_started(manager: Any, run: Any, serialized: Any, _args: Any, told: dict[str, Any], _task: Any) -> None:
    runs.start_chain(run.run_id, manager.parent_run_id, serialized, manager.tags, manager.metadata, told)


@harmless
def _tool_started(manager: Any, run: Any, serialized: Any, _args: Any, told: dict[str, Any], _task: Any) -> None:
    runs.start_tool(run.run_id, manager.parent_run_id, serialized, told)


@harmless
def _retriever_started(manager: Any, run: Any, serialized: Any, _args: Any, told: dict[str, Any], _task: Any) -> None:
    runs.start_retriever(run.run_id, manager.parent_run_id, serialized, told)


def _calls_started(operation: str, argument: str, note: Callable[[Handle | None, Any], None]) -> Starting:
    @harmless
    def started(manager: Any, made: Any, serialized: Any, args: Any, told: dict[str, Any], task: Any) -> None:
        for index, run in enumerate(made):
            handle = runs.start_call(
                operation, run.run_id, manager.parent_run_id, serialized, manager.metadata, told, task
            )
            if settings.record_content:
                note(handle, (args[0] if args else told[argument])[index])

    return started


def _ending(end: Callable[[UUID, Any], None], argument: str) -> Ending:
    @harmless
    def ended(run_id: UUID, args: tuple[Any, ...], told: dict[str, Any]) -> None:
        end(run_id, args[0] if args else told[argument])

    return ended


@harmless
def _run_ended(run_id: UUID, _args: tuple[Any, ...], _told: dict[str, Any]) -> None:
    runs.end_run(run_id)


@harmless
def _piece_came(run_id: UUID, _args: tuple[Any, ...], _told: dict[str, Any]) -> None:
    runs.receive(run_id)


_STARTS: Final[dict[str, Starting]] = {
    "on_chain_start": _chain_started,
    "on_tool_start": _tool_started,
    "on_retriever_start": _retriever_started,
    "on_chat_model_start": _calls_started(semconv.CHAT, "messages", _note_messages),
    "on_llm_start": _calls_started(semconv.TEXT_COMPLETION, "prompts", _note_prompt),
}
_run_failed: Final = _ending(runs.end_run, "error")
_ENDS: Final[dict[str, dict[str, Ending]]] = {
    "Chain": {"on_chain_end": _run_ended, "on_chain_error": _run_failed},
    "Tool": {"on_tool_end": _run_ended, "on_tool_error": _run_failed},
    "Retriever": {"on_retriever_end": _run_ended, "on_retriever_error": _run_failed},
    "LLM": {
        "on_llm_new_token": _piece_came,
        "on_stream_event": _ending(runs.receive_event, "event"),
        "on_llm_end": _ending(runs.finish_call, "response"),
        "on_llm_error": _ending(runs.fail_call, "error"),
    },
}

_hook: Final[ContextVar[ScepsyCallbackHandler | None]] = ContextVar(
    "scepsy_langchain_handler",
    default=ScepsyCallbackHandler(),  # noqa: B039 - one handler for every context is what is wanted
)


def turn_on() -> None:
    """Hear of every run of the process from now on: from the managers, or where that cannot be, as a handler."""
    from langchain_core.tracers import context as tracing  # not above: it imports what this waits for

    if hook_managers(_STARTS, _ENDS):
        return
    if not any(hook[0] is _hook for hook in tracing._configure_hooks):  # noqa: SLF001 - as below
        tracing.register_configure_hook(_hook, inheritable=True, handle_class=ScepsyCallbackHandler)


def turn_off() -> None:
    """Hear of none any more."""
    from langchain_core.tracers import context as tracing

    restore_managers()
    hooks = tracing._configure_hooks  # noqa: SLF001 - LangChain can register a hook, but not take it back
    hooks[:] = [hook for hook in hooks if hook[0] is not _hook]

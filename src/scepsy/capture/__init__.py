"""Capture: every LLM call of a program as an OpenTelemetry span, with the workflow, agent and tool that made it."""

from __future__ import annotations

from scepsy.capture.content import message, note_content, text_parts, tool_call, tool_response
from scepsy.capture.context import ContextThreadPoolExecutor, propagate
from scepsy.capture.decorators import agent, tool, workflow
from scepsy.capture.exchange import Exchange, end_call
from scepsy.capture.frame import Frame, async_generator_steps, generator_steps
from scepsy.capture.handle import Handle, Outcome, attach, current_handle, detach, how_ended, now_ns
from scepsy.capture.imports import FrameworkHook
from scepsy.capture.instrumentation import flush, instrument, uninstrument
from scepsy.capture.patching import Method, Patch
from scepsy.capture.recorder import Recorder, muted, recorder
from scepsy.capture.safety import harmless, tell
from scepsy.capture.settings import settings
from scepsy.capture.tasks import guard_task, settle_task

__all__ = [
    "ContextThreadPoolExecutor",
    "Exchange",
    "Frame",
    "FrameworkHook",
    "Handle",
    "Method",
    "Outcome",
    "Patch",
    "Recorder",
    "agent",
    "async_generator_steps",
    "attach",
    "current_handle",
    "detach",
    "end_call",
    "flush",
    "generator_steps",
    "guard_task",
    "harmless",
    "how_ended",
    "instrument",
    "message",
    "muted",
    "note_content",
    "now_ns",
    "propagate",
    "recorder",
    "settings",
    "settle_task",
    "tell",
    "text_parts",
    "tool",
    "tool_call",
    "tool_response",
    "uninstrument",
    "workflow",
]

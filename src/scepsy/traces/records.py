"""A span on its way into an execution: as a file gives it, and in Scepsy's own words.

These are the only values of which a large reading makes one per span, so they are of msgspec: made in a tenth of the
time of a frozen dataclass, not looked at by the garbage collector, and set aside in bytes as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from scepsy.semconv import KIND_AGENT, KIND_LLM, KIND_STEP, KIND_TOOL, KIND_WORKFLOW
from scepsy_optimizer.errors import ScepsyError

WORKFLOW: Final = KIND_WORKFLOW
AGENT: Final = KIND_AGENT
TOOL: Final = KIND_TOOL
STEP: Final = KIND_STEP
LLM: Final = KIND_LLM
TRANSPORT: Final = "transport"
"""The request that carries a call: timing and tokens for the LLM span above it."""
SERVER: Final = "server"
"""The engine's own span of a call: queue time and tokens for the client span above it, on another clock."""
ENGINE_START: Final = "engine start"
"""What an engine does before it serves: of no execution."""
CALL: Final = "call"
"""An LLM span that is a call of its own, whatever lies above and below it."""
CALL_LIKE: Final = frozenset({LLM, TRANSPORT, SERVER, CALL})

OK: Final = ""
FAILED: Final = "failed"
INTERRUPTED: Final = "interrupted"
"""It stopped to wait for a person, or its reader went away."""
FROM_CACHE: Final = "from cache"
"""The framework answered from its own cache: no request was sent."""


class Event(msgspec.Struct, gc=False):
    """Something that happened during a span, at `time_ns` since the epoch."""

    name: str
    time_ns: int


class RawSpan(msgspec.Struct, gc=False):
    """A span as its file gives it. Times are nanoseconds since the epoch, 0 where they are missing.

    `parent` is empty for a span without one; `remote_parent` says that the parent belongs to another process.
    `attributes` and `resource` hold plain values. `scope` names the library that made the span, `process` the process
    that it ran in, empty where the resource does not tell.
    """

    trace: str
    id: str
    parent: str
    name: str
    start_ns: int
    end_ns: int
    scope: str
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]
    failed: bool = False
    remote_parent: bool = False
    events: Sequence[Event] = ()
    process: str = ""


class SpanRecord(msgspec.Struct, array_like=True, gc=False):
    """A span in Scepsy's words, whatever dialect it came in.

    `kind` and `status` are constants from above. `label` is what calls below take as their role, empty for a span that
    only wraps others; `role` is the role that a call itself names. `lost_s` is the time before the request that was
    answered: failed attempts and the waiting between them. `detached` says that a root may be the request of a call in
    another trace, because its instrumentation loses the way there. `flaw` says what is wrong with the recorded times.
    `scope` and `process` are those of the span, told of LLM spans only.
    Counts and times that the span does not tell are None.
    """

    trace: str
    id: str
    parent: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    status: str
    remote_parent: bool
    label: str
    workflow: str
    role: str = ""
    model: str = ""
    endpoint: str = ""
    response_id: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    time_to_first_token_s: float | None = None
    queue_s: float | None = None
    lost_s: float | None = None
    detached: bool = False
    flaw: str = ""
    scope: str = ""
    process: str = ""


def process_of(resource: Mapping[str, Any]) -> str:
    """Names the process that a resource tells of, empty where it does not."""
    process = resource.get("process.pid")
    return "" if process is None else f"{resource.get('host.name') or ''} {process}"


@dataclass(slots=True, kw_only=True)
class Counts:
    """The token counts that calls tell, added up: `inputs` of them tell those of their input, `outputs` of the output.

    Cached tokens are those of the calls that tell their input.
    """

    inputs: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    outputs: int = 0
    output_tokens: int = 0

    def add(self, other: Counts) -> None:
        """Add other calls' counts to these."""
        self.inputs += other.inputs
        self.input_tokens += other.input_tokens
        self.cached_tokens += other.cached_tokens
        self.outputs += other.outputs
        self.output_tokens += other.output_tokens


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was met while reading, counted as it goes: what was left out, and what was mended, each by its reason.

    `counts` are those of the calls by LLM and role. `missing` is about the execution that was assembled last: by the
    ids of spans, of the calls that lack a count, whether that is the input's and whether it is the output's.
    """

    files: int = 0
    spans: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    counts: dict[tuple[str, str], Counts] = field(default_factory=dict)
    missing: dict[str, tuple[bool, bool]] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count what was left out."""
        if count:
            self.dropped[reason] += count


class NoTracesError(ScepsyError):
    """A file could be read, and nothing in it is a trace."""

"""Every span attribute name that Scepsy writes or reads of its own dialect, once.

`gen_ai.*`, `server.*` and `error.*` are OpenTelemetry's semantic conventions for generative AI; `scepsy.*` adds only
what they have no name for.
"""

from typing import Final

# OpenTelemetry's names.
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
REQUEST_STREAM: Final = "gen_ai.request.stream"
TIME_TO_FIRST_CHUNK_S: Final = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
REASONING_TOKENS: Final = "gen_ai.usage.reasoning.output_tokens"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
AGENT_NAME: Final = "gen_ai.agent.name"
WORKFLOW_NAME: Final = "gen_ai.workflow.name"
INPUT_MESSAGES: Final = "gen_ai.input.messages"  # these two only where the user asks for prompts and answers
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
TOOL_NAME: Final = "gen_ai.tool.name"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
ERROR_TYPE: Final = "error.type"

# Values of OPERATION.
CHAT: Final = "chat"
TEXT_COMPLETION: Final = "text_completion"
EMBEDDINGS: Final = "embeddings"
EXECUTE_TOOL: Final = "execute_tool"
INVOKE_AGENT: Final = "invoke_agent"
INVOKE_WORKFLOW: Final = "invoke_workflow"
RETRIEVAL: Final = "retrieval"
RERANK: Final = "rerank"  # no name in the conventions yet
LLM_OPERATIONS: Final = frozenset({CHAT, TEXT_COMPLETION, EMBEDDINGS, RERANK, "generate_content"})

# Scepsy's own names.
KIND: Final = "scepsy.kind"
"""What the span is: one of the KIND_ values below."""
ROLE: Final = "scepsy.role"
"""On a call: the name of the agent, node or tool nearest above it."""
TRANSPORT: Final = "scepsy.transport"
"""True on the span of an HTTP request that carries the call of the LLM span above it: timing detail, not a call."""
ATTEMPTS: Final = "scepsy.attempts"
"""How many times the request was sent."""
WASTED_S: Final = "scepsy.wasted_s"
"""Time within the call that went into attempts that failed."""
RETRY_WAIT_S: Final = "scepsy.retry_wait_s"
"""Time within the call that the client waited between attempts."""
OUTPUT_CHUNKS: Final = "scepsy.output_chunks"
"""How many pieces of a streamed answer carried something generated: about its tokens, where the server told none."""
QUEUE_S: Final = "scepsy.queue_s"
"""Time in the engine's queue, where the server told it."""
EXECUTION_S: Final = "scepsy.execution_s"
"""Time in the engine's running batch, where the server told it."""
CACHE_HIT: Final = "scepsy.cache_hit"
"""True where the framework answered from its own cache: no request was sent, so it is no call."""
OUTCOME: Final = "scepsy.outcome"
"""How it ended where it neither returned nor failed: "cancelled", "abandoned" (a stream that nobody read to its end, or
a call whose end was never told) or "interrupted" (a graph that waits for a person)."""

JOINED_BY: Final = "scepsy.joined_by"
"""On what a proxy recorded: how the call's execution is known, "traceparent", "header" or "inferred"."""
REPLICA: Final = "scepsy.replica"
"""On what a deployment's endpoint recorded: the replica that answered."""

KIND_WORKFLOW: Final = "workflow"
KIND_AGENT: Final = "agent"
KIND_TOOL: Final = "tool"
KIND_STEP: Final = "step"
KIND_LLM: Final = "llm"

"""Every span attribute name that Scepsy writes or reads of its own dialect, once.

`gen_ai.*`, `server.*` and `error.*` are OpenTelemetry's semantic conventions for generative AI; `scepsy.*` adds only
what they have no name for. Prompts and answers have no name here: they are not recorded.
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
AGENT_NAME: Final = "gen_ai.agent.name"
WORKFLOW_NAME: Final = "gen_ai.workflow.name"
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
LLM_OPERATIONS: Final = frozenset({CHAT, TEXT_COMPLETION, EMBEDDINGS, "generate_content"})

# Scepsy's own names.
KIND: Final = "scepsy.kind"
"""What the span is: one of the KIND_ values below."""
ROLE: Final = "scepsy.role"
"""On a call: the name of the agent, node or tool nearest above it."""
TRANSPORT: Final = "scepsy.transport"
"""True on the span of an HTTP request that carries the call of the LLM span above it: timing detail, not a call."""
ATTEMPTS: Final = "scepsy.attempts"
"""How many times the request was sent."""
QUEUE_S: Final = "scepsy.queue_s"
"""Time in the engine's queue, where the server told it."""

KIND_WORKFLOW: Final = "workflow"
KIND_AGENT: Final = "agent"
KIND_TOOL: Final = "tool"
KIND_STEP: Final = "step"
KIND_LLM: Final = "llm"

"""Continuous batching, step by step: what one vLLM replica does with its requests.

The model is the scheduler of vLLM's V1 engine reduced to what decides time: one token budget per step, running
sequences decode first, waiting prompts fill the rest first come first served, long prompts in chunks. A request is
admitted only when its whole context fits the KV cache, so nothing is preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile, StepClock


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One engine step: how long it takes and who has a new token, or is finished, at its end."""

    duration_s: float
    tokens: tuple[Hashable, ...]
    finished: tuple[Hashable, ...]


@dataclass(slots=True)
class _Sequence:
    id: Hashable
    prompt_left: int
    context: int
    output_left: int
    reserved: int


class Engine:
    """The state of one replica. Pure: time passes only through the durations that `step` returns."""

    def __init__(self, profile: LLMProfile, *, tensor_parallel_size: int, fraction: float) -> None:
        """Raises ScepsyError where the weights do not fit into the fraction's memory."""
        self._clock = StepClock(profile, tensor_parallel_size, fraction)
        self._kv_tokens = profile.kv_tokens(tensor_parallel_size, fraction)
        self._max_num_seqs = profile.max_num_seqs
        self._max_num_batched_tokens = profile.max_num_batched_tokens
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[Hashable, _Sequence] = {}
        self._kv_used = 0
        if self._kv_tokens == 0:
            raise ScepsyError(
                f"{profile.llm!r} does not fit into {fraction:g} of {profile.device_memory_gib:g} GiB "
                f"at tensor_parallel_size {tensor_parallel_size}"
            )

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._kv_tokens

    @property
    def waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests admitted: being prefilled or decoding."""
        return len(self._running)

    @property
    def kv_used(self) -> int:
        """Tokens of KV cache reserved by the admitted requests."""
        return self._kv_used

    def submit(self, request: Hashable, *, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> None:
        """Queue a request; it is seen by the next step.

        Raises ScepsyError if it could never be admitted, being longer than the KV cache.
        """
        if prompt_tokens + output_tokens > self._kv_tokens:
            raise ScepsyError(
                f"a request of {prompt_tokens} + {output_tokens} tokens exceeds the KV cache of {self._kv_tokens}"
            )
        # At least one token is computed, even where the prefix cache holds all of the prompt.
        new = max(1, prompt_tokens - cached_tokens)
        self._waiting.append(
            _Sequence(
                id=request,
                prompt_left=new,
                context=max(0, prompt_tokens - new),
                output_left=max(1, output_tokens),
                reserved=prompt_tokens + output_tokens,
            )
        )

    def abort(self, request: Hashable) -> None:
        """Forget a request, wherever it is; an unknown one is ignored."""
        sequence = self._running.pop(request, None)
        if sequence is not None:
            self._kv_used -= sequence.reserved
            return
        self._waiting = deque(waiting for waiting in self._waiting if waiting.id != request)

    def step(self) -> Step | None:
        """Do one step, or return None if there is nothing to do."""
        self._admit()
        if not self._running:
            return None
        budget = self._max_num_batched_tokens
        decoding = [sequence for sequence in self._running.values() if sequence.prompt_left == 0]
        budget -= len(decoding)
        prefilled = 0
        completed: list[_Sequence] = []
        for sequence in self._running.values():
            if sequence.prompt_left == 0:
                continue
            chunk = min(sequence.prompt_left, budget - prefilled)
            if chunk <= 0:
                break
            sequence.prompt_left -= chunk
            sequence.context += chunk
            prefilled += chunk
            if sequence.prompt_left == 0:
                completed.append(sequence)
        context = sum(sequence.context for sequence in decoding) / len(decoding) if decoding else 0.0
        duration_s = self._clock.step_s(len(decoding), context, prefilled)
        finished = []
        for sequence in (*decoding, *completed):
            sequence.context += 1
            sequence.output_left -= 1
            if sequence.output_left == 0:
                finished.append(sequence.id)
                self._kv_used -= sequence.reserved
                del self._running[sequence.id]
        return Step(
            duration_s=duration_s,
            tokens=tuple(sequence.id for sequence in (*decoding, *completed)),
            finished=tuple(finished),
        )

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            if self._kv_used + sequence.reserved > self._kv_tokens:
                return
            self._waiting.popleft()
            self._running[sequence.id] = sequence
            self._kv_used += sequence.reserved

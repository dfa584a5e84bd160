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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps that are alike: `steps` of them, each `step_s` long; the rest says who takes part.

    `chunks` are the prompt tokens computed, `prefilled` the sequences whose prompt is complete then: they get their
    first token at the end, as `decoding` ones get their next.
    """

    steps: int
    step_s: float
    decoding: tuple[_Sequence, ...]
    chunks: tuple[tuple[_Sequence, int], ...]
    prefilled: tuple[_Sequence, ...]


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
        self._prefilling = 0  # admitted sequences whose prompt is not yet computed
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
            self._prefilling -= sequence.prompt_left > 0
            return
        self._waiting = deque(waiting for waiting in self._waiting if waiting.id != request)

    def step(self) -> Step | None:
        """Do one step, or return None if there is nothing to do."""
        stretch = self.begin(max_steps=1)
        if stretch is None:
            return None
        tokens = tuple(sequence.id for sequence in (*stretch.decoding, *stretch.prefilled))
        return Step(duration_s=stretch.step_s, tokens=tokens, finished=self.complete(stretch, 1))

    def begin(self, *, max_steps: int | None = None) -> Stretch | None:
        """Begin as many steps as are alike: one while prompts are computed, else until the next request finishes.

        Returns None if there is nothing to do. Whoever calls it lets `steps * step_s` pass, or ends the stretch early
        after any number of whole steps, and says so with `complete` before the next `begin`.
        """
        self._admit()
        if not self._running:
            return None
        decoding = [sequence for sequence in self._running.values() if sequence.prompt_left == 0]
        chunks = self._chunks(self._max_num_batched_tokens - len(decoding)) if self._prefilling else []
        steps = 1 if chunks or not decoding else min(sequence.output_left for sequence in decoding)
        if max_steps is not None:
            steps = min(steps, max_steps)
        context = 0.0
        if decoding:
            # Half way through the stretch, by when every context has grown by half of it.
            context = sum(sequence.context for sequence in decoding) / len(decoding) + (steps - 1) / 2
        return Stretch(
            steps=steps,
            step_s=self._clock.step_s(len(decoding), context, sum(chunk for _, chunk in chunks)),
            decoding=tuple(decoding),
            chunks=tuple(chunks),
            prefilled=tuple(sequence for sequence, chunk in chunks if sequence.prompt_left == chunk),
        )

    def complete(self, stretch: Stretch, steps: int) -> tuple[Hashable, ...]:
        """End a stretch after `steps` of its steps; returns the requests that are finished then."""
        finished = []
        for sequence, chunk in stretch.chunks:
            sequence.prompt_left -= chunk
            sequence.context += chunk
            self._prefilling -= sequence.prompt_left == 0 and sequence.id in self._running
        for sequence in (*stretch.decoding, *stretch.prefilled):
            sequence.context += steps
            sequence.output_left -= steps
            if sequence.output_left == 0 and sequence.id in self._running:
                finished.append(sequence.id)
                self._kv_used -= sequence.reserved
                del self._running[sequence.id]
        return tuple(finished)

    def _chunks(self, budget: int) -> list[tuple[_Sequence, int]]:
        """Prompt tokens to compute in one step, first come first served, within the token budget."""
        chunks = []
        for sequence in self._running.values():
            if budget <= 0:
                break
            if sequence.prompt_left:
                chunk = min(sequence.prompt_left, budget)
                chunks.append((sequence, chunk))
                budget -= chunk
        return chunks

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            if self._kv_used + sequence.reserved > self._kv_tokens:
                return
            self._waiting.popleft()
            self._running[sequence.id] = sequence
            self._kv_used += sequence.reserved
            self._prefilling += 1

"""Continuous batching, step by step: what one vLLM replica does with its requests.

The model is the scheduler of vLLM's V1 engine reduced to what decides time: one token budget per step, running
sequences decode first, waiting prompts fill the rest first come first served, long prompts in chunks. A request is
admitted when its whole prompt fits the KV cache; where decoding then outgrows the cache, the youngest sequence is
preempted and computed again later. Finished contexts stay in what is free of the cache until it is needed, the least
recently used ones going first, and serve later requests with the same prefix. Tokens are counted singly, not in blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.prefix_cache import PrefixCache
from scepsy_optimizer.profile import LLMProfile, StepClock


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One engine step: how long it takes and who has a new token, or is finished, at its end."""

    duration_s: float
    tokens: tuple[Hashable, ...]
    finished: tuple[Hashable, ...]


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request. `context` is what the KV cache has of it, `shared` the part of that which lies in a prefix."""

    id: Hashable
    prompt_left: int
    context: int
    output_left: int
    cached: int
    prefix: Hashable | None
    common: int
    shared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps that are alike: `steps` of them, each `step_s` long; the rest says who takes part.

    `chunks` are the prompt tokens computed, `prefilled` the sequences whose prompt is complete then: they get their
    first token at the end, as `decoding` ones get their next. `bandwidth` is the part of the device's memory bandwidth
    that the steps ask for; it is known of replicas on a fraction of a device only.
    """

    steps: int
    step_s: float
    decoding: tuple[_Sequence, ...]
    chunks: tuple[tuple[_Sequence, int], ...]
    prefilled: tuple[_Sequence, ...]
    bandwidth: float = 0.0


class Engine:
    """The state of one replica. Pure: time passes only through the durations that `step` returns."""

    def __init__(self, profile: LLMProfile, *, tensor_parallel_size: int, fraction: float) -> None:
        """Raises ScepsyError where the weights do not fit into the fraction's memory."""
        self._clock = StepClock(profile, tensor_parallel_size, fraction)
        self._is_whole = fraction == 1
        self._kv_tokens = profile.kv_tokens(tensor_parallel_size, fraction)
        self._max_num_seqs = profile.max_num_seqs
        self._max_num_batched_tokens = profile.max_num_batched_tokens
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[Hashable, _Sequence] = {}
        self._kv_private = 0  # tokens held by running sequences, those of shared prefixes apart
        self._prefixes = PrefixCache(self._kv_tokens)
        self._prefilling = 0  # admitted sequences whose prompt is not yet computed
        self._preemptions = 0
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
        """Requests not admitted, or preempted."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests admitted: being prefilled or decoding."""
        return len(self._running)

    @property
    def kv_used(self) -> int:
        """Tokens of KV cache that the admitted requests need; what is merely kept for later ones is free."""
        return self._kv_private + self._prefixes.pinned_tokens

    @property
    def preemptions(self) -> int:
        """How often a sequence has been preempted."""
        return self._preemptions

    def submit(
        self,
        request: Hashable,
        *,
        prompt_tokens: int,
        output_tokens: int,
        cached_tokens: int = 0,
        prefix: Hashable | None = None,
        common_tokens: int = 0,
    ) -> None:
        """Queue a request; it is seen by the next step.

        Of the prompt, `cached_tokens` are taken as cached. With a `prefix`, which names requests that continue each
        other, they are the most that can be: only the first `common_tokens`, and what is still here of earlier
        requests of that name, are. Raises ScepsyError if it could never be admitted, being longer than the KV cache.
        """
        if prompt_tokens + output_tokens > self._kv_tokens:
            raise ScepsyError(
                f"a request of {prompt_tokens} + {output_tokens} tokens exceeds the KV cache of {self._kv_tokens}"
            )
        self._waiting.append(
            _Sequence(
                id=request,
                prompt_left=prompt_tokens,
                context=0,
                output_left=max(1, output_tokens),
                cached=cached_tokens,
                prefix=prefix,
                common=common_tokens,
            )
        )

    def abort(self, request: Hashable) -> None:
        """Forget a request, wherever it is; an unknown one is ignored."""
        sequence = self._running.pop(request, None)
        if sequence is not None:
            self._release(sequence)
            return
        self._waiting = deque(waiting for waiting in self._waiting if waiting.id != request)

    def step(self) -> Step | None:
        """Do one step, or return None if there is nothing to do."""
        stretch = self.begin(max_steps=1)
        if stretch is None:
            return None
        tokens = tuple(sequence.id for sequence in (*stretch.decoding, *stretch.prefilled))
        return Step(duration_s=stretch.step_s, tokens=tokens, finished=self.complete(stretch, 1))

    def begin(self, *, max_steps: int | None = None, others_bandwidth: float = 0.0) -> Stretch | None:
        """Begin as many steps as are alike: one while prompts are computed, else until the next request finishes.

        `others_bandwidth` is what other replicas on the same device ask of its memory bandwidth: where that and its own
        part exceed the whole, decoding is slower in proportion. Returns None if there is nothing to do. Whoever calls
        it lets `steps * step_s` pass, or ends the stretch early after any number of whole steps, and says so with
        `complete` before the next `begin`.
        """
        decoding = [sequence for sequence in self._running.values() if sequence.prompt_left == 0]
        has_preempted = False
        # Each decoding sequence is about to grow by one token.
        while len(self._running) > 1 and self.kv_used + len(decoding) > self._kv_tokens:
            youngest = self._preempt()
            has_preempted = True
            decoding = [sequence for sequence in decoding if sequence is not youngest]
        budget = self._max_num_batched_tokens - len(decoding)
        chunks = self._chunks(budget) if self._prefilling else []
        if self._waiting and not has_preempted:
            chunks += self._admit(budget - sum(chunk for _, chunk in chunks), len(decoding))
        if not self._running:
            return None
        steps = 1
        if decoding and not chunks:
            steps = min(sequence.output_left for sequence in decoding)
            steps = max(1, min(steps, (self._kv_tokens - self.kv_used) // len(decoding)))
        if max_steps is not None:
            steps = min(steps, max_steps)
        context = 0.0
        if decoding:
            # Half way through the stretch, by when every context has grown by half of it.
            context = sum(sequence.context for sequence in decoding) / len(decoding) + (steps - 1) / 2
        tokens = pairs = 0
        for sequence, chunk in chunks:
            tokens += chunk
            pairs += chunk * (2 * sequence.context + chunk)
        bandwidth = 0.0 if self._is_whole or not decoding else self._clock.bandwidth_share(len(decoding), context)
        contention = max(1.0, bandwidth + others_bandwidth)
        prefilled = tuple(sequence for sequence, chunk in chunks if sequence.prompt_left == chunk)
        return Stretch(
            steps=steps,
            step_s=self._clock.step_s(len(decoding), context, tokens, pairs, contention, len(prefilled)),
            decoding=tuple(decoding),
            chunks=tuple(chunks),
            prefilled=prefilled,
            bandwidth=bandwidth,
        )

    def complete(self, stretch: Stretch, steps: int) -> tuple[Hashable, ...]:
        """End a stretch after `steps` of its steps; returns the requests that are finished then."""
        finished = []
        for sequence, chunk in stretch.chunks:
            if sequence.id in self._running:
                sequence.prompt_left -= chunk
                sequence.context += chunk
                self._prefilling -= sequence.prompt_left == 0
        for group in (stretch.decoding, stretch.prefilled):
            for sequence in group:
                if sequence.id not in self._running:
                    continue
                sequence.context += steps
                sequence.output_left -= steps
                self._kv_private += steps
                if sequence.output_left == 0:
                    finished.append(sequence.id)
                    del self._running[sequence.id]
                    self._release(sequence)
        self._prefixes.shrink(self._kv_private)
        return tuple(finished)

    def _chunks(self, budget: int) -> list[tuple[_Sequence, int]]:
        """Prompt tokens of admitted sequences to compute in one step, in their order, within the token budget."""
        chunks = []
        for sequence in self._running.values():
            if budget <= 0:
                break
            if sequence.prompt_left:
                chunk = min(sequence.prompt_left, budget)
                chunks.append((sequence, chunk))
                budget -= chunk
        return chunks

    def _admit(self, budget: int, growth: int) -> list[tuple[_Sequence, int]]:
        """Admit waiting requests, first come first served, while tokens are left in the step; returns their chunks."""
        chunks = []
        while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            # The prompt, or after a preemption all that there was, and the token that follows it.
            prompt = sequence.prompt_left
            held = 0
            if sequence.prefix is not None:
                held = self._prefixes.tokens(sequence.prefix)
                cached = min(sequence.cached, sequence.common + held)
            else:
                cached = sequence.cached
            # At least one token is computed, even where the prefix cache holds all of the prompt.
            new = max(1, prompt - cached)
            shared = min(held, prompt - new)
            pinned = 0 if sequence.prefix is None else self._prefixes.cost_of_pin(sequence.prefix)
            if self.kv_used + pinned + prompt - shared + growth + 1 > self._kv_tokens and self._running:
                break
            self._waiting.popleft()
            self._running[sequence.id] = sequence
            if sequence.prefix is not None:
                self._prefixes.pin(sequence.prefix)
            sequence.shared = shared
            sequence.context = prompt - new
            sequence.prompt_left = new
            self._kv_private += prompt - shared
            self._prefilling += 1
            growth += 1
            chunk = min(new, budget)
            chunks.append((sequence, chunk))
            budget -= chunk
        self._prefixes.shrink(self._kv_private)
        return chunks

    def _preempt(self) -> _Sequence:
        """Take the youngest sequence out; it waits at the front, to be computed again from its start."""
        _, sequence = self._running.popitem()
        length = sequence.context + sequence.prompt_left
        self._release(sequence)
        sequence.prompt_left, sequence.context = length, 0
        self._waiting.appendleft(sequence)
        self._preemptions += 1
        return sequence

    def _release(self, sequence: _Sequence) -> None:
        """Give back what a sequence holds; what it has computed stays for others of its prefix."""
        self._prefilling -= sequence.prompt_left > 0
        self._kv_private -= sequence.context + sequence.prompt_left - sequence.shared
        if sequence.prefix is not None:
            self._prefixes.unpin(sequence.prefix, sequence.context)

"""What the emulator answers: lengths and words, a function of the seed and the request alone.

The same load therefore gives the same executions, whatever the allocation that serves it.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from random import Random
from typing import Any

DEFAULT_MAX_TOKENS = 256
EMBEDDING_DIMENSIONS = 64
CHARACTERS_PER_TOKEN = 4
MESSAGE_TOKENS = 4  # what a chat template adds around each message

# Lengths are lognormal about this part of max_tokens; about one in fourteen is cut off at it.
_MEDIAN_PART = 0.6
_SIGMA = 0.35

# What changes how an answer travels, not the answer.
_TRANSPORT_KEYS = frozenset({"stream", "stream_options", "user", "metadata", "request_id", "encoding_format"})

_WORDS = """
amber anchor arrow basin birch bridge canyon cedar cinder cobalt copper coral delta ember falcon fern flint forest
garnet glacier granite harbor hazel heron indigo island jasper juniper lagoon lantern ledger linen lunar maple
marble meadow mirror nectar north oasis olive onyx opal orchard otter pebble pepper pine planet prairie quartz quiet
raven reef ridge river rowan saffron sage sierra silver slate spruce stone summit thistle tide timber topaz tundra
valley velvet violet walnut water willow winter yarrow zephyr zinc
""".split()  # noqa: SIM905 - a list of 86 literals would fill the page


def text_tokens(text: str) -> int:
    """Tokens that a text counts for."""
    return max(1, math.ceil(len(text) / CHARACTERS_PER_TOKEN))


def content_tokens(content: object) -> int:
    """Tokens of a message's content: a string, a list of parts of which the texts count, or nothing."""
    if isinstance(content, str):
        return text_tokens(content)
    if isinstance(content, list):
        return sum(content_tokens(part.get("text")) for part in content if isinstance(part, Mapping))
    return 0


def request_random(seed: int, body: Mapping[str, Any], index: int) -> Random:
    """The source of randomness of the request's answer number `index`."""
    content = {key: value for key, value in body.items() if key not in _TRANSPORT_KEYS}
    text = json.dumps([seed, index, content], sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return Random(int.from_bytes(digest, "big"))  # noqa: S311 - reproducible on purpose, nothing secret


def output_tokens(random: Random, *, max_tokens: int, min_tokens: int, ignore_eos: bool) -> int:
    """Length of an answer: exactly `max_tokens` if `ignore_eos`, else drawn between `min_tokens` and it."""
    drawn = round(_MEDIAN_PART * max_tokens * math.exp(_SIGMA * random.gauss(0, 1)))
    if ignore_eos:
        return max_tokens
    return min(max_tokens, max(1, min_tokens, drawn))


def words(random: Random, tokens: int) -> list[str]:
    """An answer in tokens: first a number from 0 to 10, so that a score can be read from it, then words."""
    return [str(random.randint(0, 10)), *(f" {word}" for word in random.choices(_WORDS, k=tokens - 1))]


def embedding(random: Random) -> list[float]:
    """A vector of length one."""
    raw = [random.gauss(0, 1) for _ in range(EMBEDDING_DIMENSIONS)]
    norm = math.sqrt(sum(value * value for value in raw))
    # As 32-bit floats, so that both encodings of the answer give the same numbers.
    return list(struct.unpack(f"<{len(raw)}f", struct.pack(f"<{len(raw)}f", *(value / norm for value in raw))))

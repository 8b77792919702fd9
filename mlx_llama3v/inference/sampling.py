"""How the next token is chosen: the options in mlx-lm's spelling, and one sampler an answer.

An answer's random numbers follow from its own seed and the place of the token, not from a global state, so
that it is the same alone, in a batch, and beside the requests of other people.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_llama3v.compat import apply_min_p, apply_top_k, apply_top_p, make_logits_processors
from mlx_llama3v.errors import ContextError
from mlx_llama3v.knob import knob

PENALIZED = 20  # tokens that a repetition penalty looks back on, as in mlx-lm
CYCLES = 4  # a loop is a text that comes at least so often, back to back


class Mask(Protocol):
    """What a grammar allows next."""

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits [1, V] -> logits [1, V]."""

    def take(self, token: int) -> None:
        """The answer goes on with `token`."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when an answer ends; the defaults are greedy."""

    max_tokens: int = knob(256, "Longest answer.")
    temp: float = knob(0.0, "Temperature; 0 always takes the likeliest token.")
    top_p: float = knob(1.0, "Sample from the likeliest tokens that hold this probability.")
    top_k: int = knob(0, "Sample from this many tokens; 0: all.")
    min_p: float = knob(0.0, "Drop tokens less likely than this share of the likeliest.")
    repetition_penalty: float | None = knob(None, "Divide the odds of the last 20 tokens by this.")
    seed: int | None = knob(None, "Fixes what is sampled: each answer draws its own, the same in every run.")
    stop: tuple[str, ...] = knob((), "End the answer before this text; repeat for more.")
    loop_guard: int = knob(128, "End an answer whose last N tokens only repeat themselves (at least 4); 0: never.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        penalty = self.repetition_penalty
        for name, right, expected in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temp", 0 <= self.temp <= 100, "0 (always the likeliest token) to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (1: all tokens)"),
            ("top_k", self.top_k >= 0, "at least 0 (0: all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", penalty is None or penalty > 0, "more than 0 (1: no penalty)"),
            ("stop", "" not in self.stop, "texts that are not empty"),
            ("loop_guard", self.loop_guard == 0 or self.loop_guard >= CYCLES, f"at least {CYCLES} (0: never)"),
        ):
            if not right:
                raise ContextError(f"{name} is {getattr(self, name)}; expected {expected}.")

    def nth(self, number: int) -> Sampling:
        """For answer `number` (from 0) of those that share a seed: random numbers of its own, fixed as well."""
        if self.seed is None or number == 0:
            return self
        digest = blake2b(f"{self.seed} {number}".encode(), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest, "little"))


@lru_cache(maxsize=8)
def never(unsaid: tuple[int, ...], vocabulary: int) -> mx.array:
    """bool [V]: True at the ids that no answer may hold (`Tokens.unsaid`)."""
    found = np.zeros(vocabulary, np.bool_)
    found[list(unsaid)] = True
    mask = mx.array(found)
    mx.eval(mask)
    return mask


class Sampler:
    """Chooses the tokens of one answer, none of `never` [V]; `mask` restricts them to what a grammar allows."""

    def __init__(self, sampling: Sampling, mask: Mask | None = None, never: mx.array | None = None) -> None:
        self.sampling, self.mask, self.never = sampling, mask, never
        self._seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._count = 0
        self._penalty = make_logits_processors(repetition_penalty=sampling.repetition_penalty)

    @property
    def plain(self) -> bool:
        """Whether this is a mere argmax, so that a batch of rows may share one."""
        return self.sampling.temp == 0 and not self._penalty and self.mask is None

    def adjust(self, logits: mx.array, before: Sequence[int] | mx.array) -> mx.array:
        """Logits [1, V] after penalty and grammar; `before` are the tokens so far."""
        for penalize in self._penalty if len(before) else ():
            recent = before[-PENALIZED:]
            logits = penalize(recent if isinstance(recent, mx.array) else mx.array(list(recent)), logits)
        return logits if self.mask is None else self.mask(logits)

    def silenced(self, logits: mx.array) -> mx.array:
        """Logits [..., V] without what no answer may hold."""
        return logits if self.never is None else mx.where(self.never, -mx.inf, logits)

    def choose(self, logits: mx.array) -> mx.array:
        """[1, V] -> the next token [1]; each call is one place further in the answer."""
        how, place = self.sampling, self._count
        logits = self.silenced(logits)
        self._count += 1
        if how.temp == 0:
            return mx.argmax(logits, axis=-1)
        odds = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if how.top_p < 1:
            odds = apply_top_p(odds, how.top_p)
        if how.min_p > 0:
            odds = apply_min_p(odds, how.min_p)
        if 0 < how.top_k < logits.shape[-1]:
            odds = apply_top_k(odds, how.top_k)
        key = mx.random.key((self._seed * 0x9E3779B97F4A7C15 + place) % 2**63)
        return mx.random.categorical(odds / how.temp, key=key)

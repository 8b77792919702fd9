"""An answer as it grows: text that is sure, and the decision that it has ended.

It ends with a stop id, before a stop text, at its limit, or where it only repeats itself: small models fall
into loops, and a reader should neither wait for the rest nor take it for an answer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from mlx_llama3v.inference.sampling import CYCLES, Sampling
from mlx_llama3v.text.tokens import Tokens


@dataclass(frozen=True)
class Timings:
    """Seconds that an answer took, by stage."""

    encode: float  # pictures -> patch embeddings
    prefill: float  # up to the first token
    decode: float

    @property
    def first_token(self) -> float:
        """From the question to the first token."""
        return self.encode + self.prefill


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    tokens: tuple[int, ...]  # without the stop token and what follows a stop text
    finish_reason: str  # "stop": the model or a stop text; "length": max_tokens, the context; "repetition": a loop
    prompt_tokens: int  # tokens prefilled for this answer
    cached_tokens: int  # tokens of earlier turns whose keys and values were reused
    timings: Timings
    slices: int = 0  # of the pictures that this turn brought
    visual_tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """Text as it arrives; the last piece of an answer carries the whole `answer`."""

    text: str
    answer: Answer | None = None


class Loops:
    """Sees when the last `length` tokens are one short text again and again."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._last: deque[int] = deque(maxlen=length // CYCLES)
        self._runs = [0] * (length // CYCLES)  # tokens in a row that equal the one p + 1 before

    def add(self, token: int) -> bool:
        """Take a token; True where it closes a loop."""
        for p, old in enumerate(reversed(self._last)):
            self._runs[p] = self._runs[p] + 1 if old == token else 0
        self._last.append(token)
        return any(run + p + 1 >= self._length for p, run in enumerate(self._runs) if run)


class Writer:
    """Tokens of one answer -> text, and `finish` once it has ended."""

    def __init__(self, tokens: Tokens, sampling: Sampling, limit: int) -> None:
        self.tokens: list[int] = []
        self.text = ""  # all that was handed out
        self.finish: str | None = None
        self._vocabulary, self._sampling, self._limit = tokens, sampling, limit
        self._detokenizer = tokens.detokenizer()
        self._held = ""  # may be the beginning of a stop text
        self._loops = Loops(sampling.loop_guard)

    def add(self, token: int) -> str:
        """Take a token; returns the text that is sure now. `finish` is set where the answer ends with it."""
        if token in self._vocabulary.stop:
            self.finish = "stop"
            return self._hand_out(self._detokenizer.finish(), last=True)
        self.tokens.append(token)
        sure = self._hand_out(self._detokenizer.add(token))
        if self.finish is None and self._loops.add(token):
            self.finish = "repetition"
        if self.finish is None and len(self.tokens) >= self._limit:
            self.finish = "length"
        if self.finish in ("repetition", "length"):
            sure += self._hand_out(self._detokenizer.finish(), last=True)
        return sure

    def close(self, reason: str) -> str:
        """End the answer here; returns the text that was held back."""
        if self.finish is not None:
            return ""
        self.finish = reason
        return self._hand_out(self._detokenizer.finish(), last=True)

    def _hand_out(self, text: str, last: bool = False) -> str:
        text = self._held + text
        places = [text.find(stop) for stop in self._sampling.stop if stop in text]
        if places:
            self.finish, self._held = "stop", ""
            self.text += text[: min(places)]
            self._cut_tokens()
            return text[: min(places)]
        held = 0 if last else max((_overlap(text, stop) for stop in self._sampling.stop), default=0)
        sure = text[: len(text) - held]
        self._held = text[len(text) - held :]
        self.text += sure
        return sure

    def _cut_tokens(self) -> None:
        """Keep the tokens whose text comes whole before the stop text."""
        while self.tokens and not self.text.startswith(self._vocabulary.decode(self.tokens)):
            self.tokens.pop()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

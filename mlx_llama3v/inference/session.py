"""A conversation that keeps its KV cache: turn n prefills its own tokens only.

Invariant: `ids` is the conversation so far, and the first `len(self._held)` entries of the KV cache belong to
the places whose keys `_held` names. A turn prefills what the cache does not hold yet: its own tokens; after
`undo` (retry, an edited question) only what differs; after `restore` everything, once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v.compat import generate_step, maybe_quantize_kv_cache
from mlx_llama3v.config import Encoded
from mlx_llama3v.errors import ContextError
from mlx_llama3v.inference.answer import Answer, Piece, Timings, Writer
from mlx_llama3v.inference.rows import common, embed_rest, place_keys, room, visual_tokens
from mlx_llama3v.inference.sampling import PENALIZED, Sampler, Sampling, never
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import FIRST_VISUAL, Message, Rendered, render
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.vision.encode import Encoder

Picture = str | Path | bytes | Encoded  # a file, its bytes, or embeddings from a store
REMEMBERED = 32  # encoded pictures that a session keeps beyond its own turns


@dataclass(frozen=True)
class Memory:
    """What the KV cache may take and how it is filled."""

    kv_bits: int | None = field(default=None, metadata={"help": "Keep keys and values in so many bits (4 or 8)."})
    max_kv_size: int | None = field(
        default=None, metadata={"help": "Longest conversation in tokens [default: what the model was trained for]."}
    )
    prefill_step_size: int = field(default=2048, metadata={"help": "Prompt tokens that are processed at a time."})

    def __post_init__(self) -> None:
        if self.kv_bits not in (None, 4, 8):
            raise ContextError(f"kv_bits is {self.kv_bits}; expected 4 or 8.")
        for name in ("max_kv_size", "prefill_step_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ContextError(f"{name} is {value}; expected at least 1.")

    def group_size(self, head_dim: int) -> int:
        """Values that share a scale in a quantized cache. Raises ContextError where none fits."""
        fitting = [size for size in (64, 32) if head_dim % size == 0]
        if self.kv_bits and not fitting:
            raise ContextError(f"kv_bits is {self.kv_bits}, but heads of {head_dim} values cannot be quantized.")
        return fitting[0] if fitting else 64


@dataclass(frozen=True)
class Turn:
    """One question of a conversation; `start` and `length` are its place in `Session.ids`."""

    text: str
    pictures: tuple[Encoded, ...]
    start: int
    length: int


Mark = tuple[list[int], list[Turn], list[int], list[Encoded]]


class Session:
    """A conversation with one model.

    `encoder` may be absent where pictures come as embeddings or not at all. One thread at a time.
    """

    def __init__(
        self,
        model: Llama3V,
        tokens: Tokens,
        encoder: Encoder | None = None,
        system: str | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.tokens, self.encoder, self.system = model, tokens, encoder, system
        self.memory = memory or Memory()
        self._group_size = self.memory.group_size(int(model.config.text_config["head_dim"]))
        self._known: dict[str, Encoded] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.ids: list[int] = []
        self.turns: list[Turn] = []
        self._source: list[int] = []
        self._pictures: list[Encoded] = []
        self._open: Writer | None = None  # of the answer that is being read
        self._empty()

    def _empty(self) -> None:
        """Forget keys and values."""
        self._held = np.zeros(0, np.int64)
        self._cache = self.model.make_cache()

    def undo(self) -> Turn | None:
        """Take the last turn back, with its answer; what it shares with the next one need not be prefilled again."""
        self._settle()
        if not self.turns:
            return None
        turn = self.turns.pop()
        del self.ids[turn.start :], self._source[turn.start :]
        del self._pictures[len(self._pictures) - len(turn.pictures) :]
        return turn

    def mark(self) -> Mark:
        """Where the conversation stands, for `back`."""
        self._settle()
        return list(self.ids), list(self.turns), list(self._source), list(self._pictures)

    def back(self, mark: Mark) -> None:
        """Return to where the conversation stood."""
        self._settle()
        self.ids, self.turns, self._source, self._pictures = (list(part) for part in mark)  # type: ignore[assignment]

    def answers(self) -> list[str]:
        """The answer of every turn so far."""
        self._settle()
        ends = [turn.start for turn in self.turns[1:]] + [len(self.ids)]
        starts = [turn.start + turn.length for turn in self.turns]
        return [self.tokens.decode(self.ids[a:b]) for a, b in zip(starts, ends, strict=True)]

    def restore(self, turns: Sequence[tuple[str, Sequence[Picture], str]]) -> None:
        """Take up a conversation of (question, pictures, answer) as if it had been held here.

        Raises as `ask` does; the session then has the turns before the one that failed.
        """
        self.reset()
        for question, images, answer in turns:
            pictures = [self.encode(image) for image in images]
            self._note(self._render(question, pictures), question, pictures)
            said = self.tokens.encode(self.tokens.layout.answer.replace("{text}", answer.strip()))
            self.ids += said
            self._source += [0] * len(said)

    def ask(self, text: str, images: Sequence[Picture] = (), sampling: Sampling | None = None) -> Iterator[Piece]:
        """Answer a user turn piece by piece; the last piece carries the Answer.

        Pictures are read and the turn is checked at once, decoding runs as the iterator is read. An iterator
        left early leaves the answer cut off there. Raises ImageError; ContextError for a turn that does not
        fit the context, a picture without visual tokens, or a picture where there is no vision tower.
        """
        self._settle()
        sampling = sampling or Sampling()
        started = perf_counter()
        pictures = [self.encode(image) for image in images]
        encode = perf_counter() - started
        turn = self._render(text, pictures)
        space = room(self.model, len(self.ids) + len(turn), self.memory.max_kv_size)
        return self._answer(turn, text, pictures, sampling, min(space, sampling.max_tokens), encode)

    def encode(self, image: Picture) -> Encoded:
        """A picture's embeddings; the same content is encoded once. Raises ImageError, ContextError."""
        if isinstance(image, Encoded):
            return image
        if self.encoder is None:
            raise ContextError("the model directory has no vision tower; ask without pictures.")
        try:
            content = image if isinstance(image, bytes) else Path(image).read_bytes()
        except OSError:
            return self.encoder.embed(image)  # says what is wrong with the file
        key = f"{sha256(content).hexdigest()} {self.encoder.tiling}"
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = self.encoder.embed(image)
        return self._known[key]

    def _render(self, text: str, pictures: Sequence[Encoded]) -> Rendered:
        messages = [Message("user", text, tuple(range(len(pictures))))]
        if self.system and not self.ids:
            messages.insert(0, Message("system", self.system))
        layouts = [picture.layout for picture in pictures]
        projector = self.model.config.projector_config
        earlier = len(self._pictures)
        return render(messages, layouts, self.tokens, projector, generate=True, start=not self.ids, earlier=earlier)

    def _note(self, turn: Rendered, text: str, pictures: Sequence[Encoded]) -> None:
        """The turn becomes part of the conversation."""
        self.turns.append(Turn(text, tuple(pictures), len(self.ids), len(turn)))
        whole = self._with(turn)
        self.ids, self._source = whole.ids.tolist(), whole.source.tolist()
        self._pictures += pictures

    def _with(self, turn: Rendered) -> Rendered:
        """The conversation with one more turn, as one row."""
        before = visual_tokens(self.model, self._pictures)
        source = np.where(turn.source >= FIRST_VISUAL, turn.source + before, turn.source)
        ids = np.concatenate([np.array(self.ids, np.int32), turn.ids])
        source = np.concatenate([np.array(self._source, np.int32), source]).astype(np.int32)
        return Rendered(ids, source, np.zeros(len(ids), np.bool_))

    def _answer(
        self,
        turn: Rendered,
        text: str,
        pictures: Sequence[Encoded],
        sampling: Sampling,
        max_tokens: int,
        encode: float,
    ) -> Iterator[Piece]:
        started = prefilled = perf_counter()
        row, everything = self._with(turn), [*self._pictures, *pictures]
        keys = place_keys(row, everything, self.model)
        cached = min(common(self._held, keys), len(row) - 1)  # the last token is processed for its logits
        self._held = keys[:cached]
        for layer in self._cache:
            layer.trim(layer.offset - cached)
        self._open = writer = Writer(self.tokens, sampling, max_tokens)
        with closing(self._steps(row, everything, cached, sampling, max_tokens)) as steps:
            try:
                for token in steps:
                    if len(self._held) == cached:
                        prefilled = perf_counter()
                        self._note(turn, text, pictures)
                        self._held = keys
                    if piece := writer.add(token):
                        yield Piece(piece)
                        if self._open is not writer:
                            return  # something else was asked meanwhile
                    if writer.finish:
                        break
            except GeneratorExit:  # the reader left between two passes
                raise
            except BaseException:  # within one: layers may hold different lengths, or a place without its keys
                self._empty()
                raise
            finally:  # also where the reader left: what was said so far ends the conversation
                if self._open is writer:
                    self._settle()
        rest = writer.close("length")
        timings = Timings(encode, prefilled - started, perf_counter() - prefilled)
        slices, visual = sum(len(p.layout.grids) for p in pictures), visual_tokens(self.model, pictures)
        answer = tuple(writer.tokens)
        finish = writer.finish or "length"
        yield Piece(rest, Answer(writer.text, answer, finish, len(row) - cached, cached, timings, slices, visual))

    def _settle(self) -> None:
        """What was said of the open answer ends the conversation; what the cache holds beyond is trimmed later."""
        said, self._open = self._open.tokens if self._open else [], None
        self.ids += said
        self._source += [0] * len(said)
        self._held = np.concatenate([self._held, np.array(said, np.int64)])[: self._cache[0].offset]

    def _steps(
        self, row: Rendered, pictures: Sequence[Encoded], start: int, sampling: Sampling, max_tokens: int
    ) -> Generator[int, None, None]:
        """Tokens of the answer; each but the first is in the KV cache when it is yielded.

        The prompt is run here and not in mlx-lm's loop, which gives its last token a pass of its own: behind a
        short question that is a good part of the time to the first token.
        """
        vocabulary = self.model.vocab_size
        sampler = Sampler(sampling, never=never(self.tokens.unsaid(vocabulary), vocabulary))
        options: dict[str, Any] = {
            "kv_bits": self.memory.kv_bits,
            "kv_group_size": self._group_size,
            "quantized_kv_start": 0,
        }
        logits = self.model.logits(self._prefill(row, pictures, start, options)[:, -1])
        (first,) = np.array(sampler.choose(sampler.adjust(logits, row.ids[-PENALIZED:].tolist()))).tolist()
        yield first
        if max_tokens == 1:
            return
        steps = generate_step(
            mx.array([first]),
            self.model,
            max_tokens=max_tokens - 1,
            sampler=sampler.choose,
            logits_processors=_processors(sampler, row.ids),
            prompt_cache=self._cache,
            **options,
        )
        with closing(steps):
            for token, _ in steps:
                yield int(token)

    def _prefill(self, row: Rendered, pictures: Sequence[Encoded], start: int, options: dict[str, Any]) -> mx.array:
        """Run the row from `start` on, a step at a time -> the last step's states [1, L, D]."""
        ids, vectors = embed_rest(self.model, row, pictures, start)
        size = self.memory.prefill_step_size
        for begin in range(0, len(ids), size):
            end = begin + size
            hidden = self.model.hidden(ids[None, begin:end], self._cache, vectors[None, begin:end])
            maybe_quantize_kv_cache(self._cache, **options)
            if end < len(ids):
                mx.eval([layer.state for layer in self._cache])
                mx.clear_cache()
        return hidden


def _processors(sampler: Sampler, before: np.ndarray) -> list[Any]:
    """The penalty for mlx-lm's loop, which shows it the tokens behind `before`."""
    if sampler.sampling.repetition_penalty is None:
        return []
    earlier = mx.array(before[-PENALIZED:].astype(np.int32))
    return [lambda tokens, logits: sampler.adjust(logits, mx.concatenate([earlier, tokens.astype(mx.int32)]))]

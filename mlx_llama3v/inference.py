"""From a question to an answer: a chat session that keeps its KV cache, and greedy decoding of whole batches.

A session's invariant: `ids` is the conversation so far, and the first `len(ids)` entries of the KV cache
belong to it. What lies beyond (a stop token, a turn that was interrupted) is trimmed before the next turn,
which then prefills its own tokens only.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v import checkpoint
from mlx_llama3v.compat import (
    BatchKVCache,
    generate_step,
    make_logits_processors,
    make_sampler,
    trim_prompt_cache,
)
from mlx_llama3v.config import Encoded
from mlx_llama3v.errors import ContextError
from mlx_llama3v.model import Llama3V
from mlx_llama3v.projector import pack
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.text.prompt import Message, Rendered, render
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.vision.encode import Encoder

Picture = str | Path | bytes | Encoded  # a file, its bytes, or embeddings from a store


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy."""

    max_tokens: int = _knob(256, "Longest answer.")
    temp: float = _knob(0.0, "Temperature; 0 always takes the likeliest token.")
    top_p: float = _knob(1.0, "Sample from the likeliest tokens that hold this probability.")
    top_k: int = _knob(0, "Sample from this many tokens; 0: all.")
    min_p: float = _knob(0.0, "Drop tokens less likely than this share of the likeliest.")
    repetition_penalty: float | None = _knob(None, "Divide the odds of the last 20 tokens by this.")
    seed: int | None = _knob(None, "Fixes what is sampled.")

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temp < 0:
            raise ContextError(f"max_tokens is {self.max_tokens}, temp {self.temp}; expected at least 1 and 0.")


@dataclass(frozen=True)
class Timings:
    """Seconds that an answer took, by stage."""

    encode: float  # pictures -> patch embeddings
    prefill: float  # up to the first token
    decode: float


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    tokens: tuple[int, ...]  # without the stop token
    finish_reason: str  # "stop": the model ended it; "length": max_tokens or the context did
    prompt_tokens: int  # tokens prefilled for this answer
    cached_tokens: int  # tokens of earlier turns whose keys and values were reused
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """Text as it arrives; the last piece of an answer carries the whole `answer`."""

    text: str
    answer: Answer | None = None


class Session:
    """A conversation with one model.

    `encoder` may be absent where pictures come as embeddings or not at all. One thread at a time.
    """

    def __init__(
        self, model: Llama3V, tokens: Tokens, encoder: Encoder | None = None, system: str | None = None
    ) -> None:
        self.model, self.tokens, self.encoder, self.system = model, tokens, encoder, system
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.ids: list[int] = []
        self._cache = self.model.make_cache()

    def ask(self, text: str, images: Sequence[Picture] = (), sampling: Sampling | None = None) -> Iterator[Piece]:
        """Answer a user turn piece by piece; the last piece carries the Answer.

        Pictures are read and the turn is checked at once, decoding runs as the iterator is read. An iterator
        left early leaves the answer cut off there. Raises ImageError; ContextError for a turn that does not
        fit the context, a picture without visual tokens, or a picture where there is no vision tower.
        """
        sampling = sampling or Sampling()
        started = perf_counter()
        pictures = [self._encode(image) for image in images]
        encode = perf_counter() - started
        messages = [Message("user", text, tuple(range(len(pictures))))]
        if self.system and not self.ids:
            messages.insert(0, Message("system", self.system))
        layouts = [picture.layout for picture in pictures]
        projector = self.model.config.projector_config
        turn = render(messages, layouts, self.tokens, projector, generate=True, start=not self.ids)
        room = _room(self.model, len(self.ids) + len(turn))
        return self._answer(turn, pictures, sampling, min(room, sampling.max_tokens), encode)

    def _encode(self, image: Picture) -> Encoded:
        if isinstance(image, Encoded):
            return image
        if self.encoder is None:
            raise ContextError("the model directory has no vision tower; ask without pictures.")
        return self.encoder.embed(image)

    def _answer(
        self, turn: Rendered, pictures: Sequence[Encoded], sampling: Sampling, max_tokens: int, encode: float
    ) -> Iterator[Piece]:
        cached = len(self.ids)
        trim_prompt_cache(self._cache, self._cache[0].offset - cached)
        started = prefilled = perf_counter()
        text, answer, finish = "", [], "length"
        detokenizer = self.tokens.detokenizer()
        with closing(self._steps(turn, pictures, sampling, max_tokens)) as steps:
            for token in steps:
                if len(self.ids) == cached:
                    prefilled = perf_counter()
                    self.ids += turn.ids.tolist()
                if token in self.tokens.stop:
                    finish = "stop"
                    break
                self.ids.append(token)
                answer.append(token)
                if piece := detokenizer.add(token):
                    text += piece
                    yield Piece(piece)
        rest = detokenizer.finish()
        timings = Timings(encode, prefilled - started, perf_counter() - prefilled)
        yield Piece(rest, Answer(text + rest, tuple(answer), finish, len(turn), cached, timings))

    def _steps(
        self, turn: Rendered, pictures: Sequence[Encoded], sampling: Sampling, max_tokens: int
    ) -> Generator[int, None, None]:
        """Tokens of the answer; each is in the KV cache when it is yielded."""
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        ids, vectors = embed_rows(self.model, [turn], [pictures])
        steps = generate_step(
            ids[0],
            self.model,
            max_tokens=max_tokens,
            sampler=make_sampler(sampling.temp, sampling.top_p, sampling.min_p, top_k=sampling.top_k),
            logits_processors=make_logits_processors(repetition_penalty=sampling.repetition_penalty),
            prompt_cache=self._cache,
            input_embeddings=vectors[0],
        )
        with closing(steps):
            for token, _ in steps:
                yield int(token)


def load(model: str | Path, run: str | Path | None = None, *, system: str | None = None) -> Session:
    """Open a model directory (or Hub repo id), with what a training run changed on top.

    Raises CheckpointError for a directory that is missing, incomplete or not made by `convert`.
    """
    path = checkpoint.resolve(model)
    config = checkpoint.load_config(path)
    llama3v = checkpoint.load_model(path)
    if run is not None:
        checkpoint.load_run(llama3v, Path(run))
    encoder = load_encoder(path) if read_tensors(path, ("vision_tower.",)) else None
    if encoder is not None:
        encoder.pool = checkpoint.run_pool(run) or encoder.pool
    tokens = Tokens.load(path, config.marker_ids, config.eos_token_ids)
    return Session(llama3v, tokens, encoder, system)


def load_encoder(model: str | Path) -> Encoder:
    """The vision tower of a model directory with all that decides what it sees. Raises CheckpointError."""
    path = checkpoint.resolve(model)
    config, tower = checkpoint.load_config(path), checkpoint.load_tower(path)
    return Encoder(
        tower, config.vision_config, config.image, config.tiling, config.vision_feature_layer, config.patch_pool
    )


def stream(session: Session, prompt: str, images: Sequence[Picture] = (), **sampling: Any) -> Iterator[str]:
    """One answer in a fresh conversation, as text that arrives; keywords are Sampling's fields."""
    session.reset()
    for piece in session.ask(prompt, images, Sampling(**sampling)):
        if piece.text:
            yield piece.text


def generate(session: Session, prompt: str, images: Sequence[Picture] = (), **sampling: Any) -> str:
    """One answer in a fresh conversation; keywords are Sampling's fields."""
    return "".join(stream(session, prompt, images, **sampling))


def embed_rows(
    model: Llama3V, rows: Sequence[Rendered], pictures: Sequence[Sequence[Encoded]]
) -> tuple[mx.array, mx.array]:
    """Rows and their pictures -> ids [B, L] and the decoder's inputs [B, L, D], padded at the end."""
    shape = (len(rows), max(map(len, rows)))
    ids, source = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    slices = pack(pictures, model.config.projector_config)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        source[i, : len(row)] = slices.place(i, row.source) if slices else row.source
    inputs = mx.array(ids)
    if slices is None:
        return inputs, model.embed(inputs)
    patches, grid = mx.array(slices.patches), mx.array(slices.grid)
    return inputs, model.embed(inputs, mx.array(source), patches, grid, slices.num_tokens)


def _room(model: Llama3V, used: int) -> int:
    """Tokens that still fit behind `used`. Raises ContextError where none does."""
    limit = int(model.config.text_config["max_position_embeddings"])
    if used >= limit:
        raise ContextError(
            f"the conversation is {used} tokens long with its pictures, but the context holds {limit}; "
            "start a new one, or use fewer or smaller pictures."
        )
    return limit - used


@dataclass(frozen=True)
class Request:
    """One conversation to be answered by `batch_generate`; `caption` asks in the form of stage pretrain."""

    messages: tuple[Message, ...]
    pictures: tuple[Encoded, ...] = ()
    caption: bool = False


def batch_generate(
    model: Llama3V, tokens: Tokens, requests: Sequence[Request], max_tokens: int = 64, batch_size: int = 32
) -> list[Answer]:
    """Greedy answers to many requests, in their order, each as if it were asked alone.

    Requests of similar length share a batch. The timings of an answer are those of its batch.
    Raises ContextError as `Session.ask` does.
    """
    projector = model.config.projector_config
    rows = [
        render(
            request.messages,
            [picture.layout for picture in request.pictures],
            tokens,
            projector,
            generate=True,
            caption=request.caption,
        )
        for request in requests
    ]
    limits = [min(max_tokens, _room(model, len(row))) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        decoded = _Batch(model, tokens, [rows[i] for i in chosen], [requests[i].pictures for i in chosen])
        answers.update(zip(chosen, decoded.run([limits[i] for i in chosen]), strict=True))
    return [answers[i] for i in range(len(rows))]


class _Batch:
    """One batch of rows under greedy decoding: prefilled padded at the end, decoded padded in front."""

    def __init__(
        self, model: Llama3V, tokens: Tokens, rows: Sequence[Rendered], pictures: Sequence[Sequence[Encoded]]
    ) -> None:
        self.model, self.tokens, self.rows, self.pictures = model, tokens, rows, pictures
        self.cache = [BatchKVCache([0] * len(rows)) for _ in model.layers]

    def run(self, limits: Sequence[int]) -> list[Answer]:
        """Decode until every row has ended or has `limits[row]` tokens."""
        started = perf_counter()
        current = self._prefill()
        prefilled = perf_counter()
        found: list[list[int]] = [[] for _ in self.rows]
        stopped: set[int] = set()
        running = list(range(len(self.rows)))
        while running:
            going = []
            for place, (row, token) in enumerate(zip(running, current, strict=True)):
                if token in self.tokens.stop:
                    stopped.add(row)
                    continue
                found[row].append(token)
                if len(found[row]) < limits[row]:
                    going.append(place)
            current = self._step([current[place] for place in going], going, len(running))
            running = [running[place] for place in going]
        timings = Timings(0.0, prefilled - started, perf_counter() - prefilled)
        return [
            Answer(
                self.tokens.decode(ids),
                tuple(ids),
                "stop" if i in stopped else "length",
                len(row),
                0,
                timings,
            )
            for i, (row, ids) in enumerate(zip(self.rows, found, strict=True))
        ]

    def _prefill(self) -> list[int]:
        """The first token of every row. Padding at the end needs no mask; the cache then moves it ahead."""
        lengths = [len(row) for row in self.rows]
        ids, vectors = embed_rows(self.model, self.rows, self.pictures)
        for layer in self.cache:
            layer.prepare(right_padding=[max(lengths) - length for length in lengths])
        hidden = self.model.hidden(ids, self.cache, vectors)
        last = hidden[mx.arange(len(lengths)), mx.array(lengths) - 1]
        for layer in self.cache:
            layer.finalize()
        return _likeliest(self.model.logits(last))

    def _step(self, current: list[int], going: list[int], rows: int) -> list[int]:
        """The next token of the rows at `going`; the others leave the cache."""
        if not going:
            return []
        if len(going) < rows:
            for layer in self.cache:
                layer.filter(mx.array(going))
        logits = self.model(mx.array(current)[:, None], self.cache)
        return _likeliest(logits[:, -1])


def _likeliest(logits: mx.array) -> list[int]:
    """[B, V] -> the id of the largest logit in each row."""
    return [int(i) for i in np.array(mx.argmax(logits, axis=-1))]

"""Answers that are decoded together: rows are prefilled, join, and leave between two steps.

The keys and values of one row stand in a plain cache, those of several in one that pads them in front. Rows
never see one another: what a row says does not depend on who runs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v.compat import BatchKVCache
from mlx_llama3v.config import Encoded
from mlx_llama3v.inference.answer import Answer, Timings, Writer
from mlx_llama3v.inference.rows import embed_rest, embed_rows, room, visual_tokens
from mlx_llama3v.inference.sampling import PENALIZED, Mask, Sampler, Sampling, never
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import Message, Rendered, render
from mlx_llama3v.text.tokens import Tokens

PREFILL = 2048  # tokens that go through the decoder at a time
CLEAR_STEPS = 256  # between two releases of MLX's buffers: lengths never come twice, so they would pile up


@dataclass(frozen=True)
class Request:
    """One conversation to be answered by `batch_generate`; `caption` asks in the form of stage pretrain."""

    messages: tuple[Message, ...]
    pictures: tuple[Encoded, ...] = ()
    caption: bool = False


def render_request(model: Llama3V, tokens: Tokens, request: Request) -> Rendered:
    """The row of a request. Raises ContextError and DataError as `render` does."""
    layouts, projector = [picture.layout for picture in request.pictures], model.config.projector_config
    return render(request.messages, layouts, tokens, projector, generate=True, caption=request.caption)


@dataclass(eq=False)
class Row:
    """One answer under way."""

    row: Rendered
    pictures: Sequence[Encoded]
    writer: Writer
    sampler: Sampler
    cached: int = 0
    started: float = field(default_factory=perf_counter)
    first: float = 0.0  # when its first token came

    def take(self, token: int) -> str:
        """Give the writer a token; returns the text that is sure now."""
        self.first = self.first or perf_counter()
        if self.sampler.mask is not None:
            self.sampler.mask.take(token)
        return self.writer.add(token)

    def before(self) -> list[int]:
        """The tokens that a penalty looks at."""
        return [*self.row.ids[-PENALIZED:].tolist(), *self.writer.tokens][-PENALIZED:]

    def answer(self, model: Llama3V, encode: float = 0.0) -> Answer:
        """What was said."""
        timings = Timings(encode, self.first - self.started, perf_counter() - self.first)
        slices = sum(len(picture.layout.grids) for picture in self.pictures)
        new, visual = len(self.row) - self.cached, visual_tokens(model, self.pictures)
        said, finish = tuple(self.writer.tokens), self.writer.finish or "length"
        return Answer(self.writer.text, said, finish, new, self.cached, timings, slices, visual)


def new_row(
    model: Llama3V,
    tokens: Tokens,
    row: Rendered,
    pictures: Sequence[Encoded],
    sampling: Sampling,
    mask: Mask | None = None,
    most: int | None = None,
) -> Row:
    """A row ready to be prefilled. Raises ContextError where the context (of at most `most`) does not hold it."""
    limit = min(sampling.max_tokens, room(model, len(row), most))
    unsaid = never(tokens.unsaid(model.vocab_size), model.vocab_size)
    return Row(row, pictures, Writer(tokens, sampling, limit), Sampler(sampling, mask, unsaid))


class Prefill:
    """One row on its way into the KV cache, a bit at a time, so that others can go on answering."""

    def __init__(self, model: Llama3V, row: Row, cache: list[Any] | None = None) -> None:
        """`cache` holds the row's first `row.cached` tokens already."""
        self.model, self.row = model, row
        self.cache = model.make_cache() if cache is None else cache
        self._ids, self._vectors = embed_rest(model, row.row, row.pictures, row.cached)
        self._done = 0

    def advance(self, tokens: int = PREFILL) -> int | None:
        """Process up to `tokens` more; the first token of the answer once all are done."""
        end = min(self._done + tokens, len(self._ids))
        hidden = self.model.hidden(self._ids[None, self._done : end], self.cache, self._vectors[None, self._done : end])
        self._done = end
        last = end == len(self._ids)
        token = _choose([self.row], self.model.logits(hidden[:, -1]))[0] if last else None
        mx.eval([layer.state for layer in self.cache])
        mx.clear_cache()
        return token


class Running:
    """The rows that are decoded together."""

    def __init__(self, model: Llama3V) -> None:
        self.model = model
        self.rows: list[Row] = []
        self._current: list[int] = []  # the last token of each row, not yet in the cache
        self._cache: list[Any] = []
        self._steps = 0

    def join(self, row: Row, token: int, cache: list[Any]) -> None:
        """Add a row that was prefilled alone; `token` is the first of its answer."""
        self._extend([row], [token], cache)

    def prefill(self, rows: Sequence[Row]) -> list[int]:
        """Prefill rows side by side and add them; returns the first token of each answer.

        Padding at the end needs no mask; the cache then moves it ahead.
        """
        lengths = [len(row.row) for row in rows]
        ids, vectors = embed_rows(self.model, [row.row for row in rows], [row.pictures for row in rows])
        cache: list[Any] = [BatchKVCache([0] * len(rows)) for _ in self.model.layers]
        for layer in cache:
            layer.prepare(right_padding=[max(lengths) - length for length in lengths])
        hidden = self.model.hidden(ids, cache, vectors)
        last = hidden[mx.arange(len(lengths)), mx.array(lengths) - 1]
        for layer in cache:
            layer.finalize()
        first = _choose(rows, self.model.logits(last))
        self._extend(rows, first, cache)
        mx.clear_cache()
        return first

    def step(self) -> list[int]:
        """The next token of every row, in the order of `rows`."""
        logits = self.model(mx.array(self._current)[:, None], self._cache)
        self._current = _choose(self.rows, logits[:, -1])
        self._steps += 1
        if self._steps % CLEAR_STEPS == 0:
            mx.clear_cache()
        return list(self._current)

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Let the other rows go."""
        places = [place for place, row in enumerate(self.rows) if wanted(row)]
        if len(places) == len(self.rows):
            return
        if not places:
            self._cache = []
        elif len(places) == 1:
            self._cache = self.extract(places[0])
        else:
            for layer in self._cache:
                layer.filter(mx.array(places))
        self.rows = [self.rows[place] for place in places]
        self._current = [self._current[place] for place in places]

    def extract(self, place: int) -> list[Any]:
        """The keys and values of one row, in caches of its own. They may share memory with the running ones."""
        if isinstance(self._cache[0], BatchKVCache):
            return [layer.extract(place) for layer in self._cache]
        return self._cache

    def _extend(self, rows: Sequence[Row], tokens: Sequence[int], cache: list[Any]) -> None:
        if not self.rows:
            self._cache = cache
        else:
            self._cache, cache = _batched(self._cache), _batched(cache)
            for mine, other in zip(self._cache, cache, strict=True):
                mine.extend(other)
        self.rows += rows
        self._current += tokens


def _batched(cache: list[Any]) -> list[Any]:
    """A cache that can take more rows."""
    return [layer if isinstance(layer, BatchKVCache) else BatchKVCache.merge([layer]) for layer in cache]


def _choose(rows: Sequence[Row], logits: mx.array) -> list[int]:
    """Logits [B, V] -> the next token of each row."""
    chosen = np.array(mx.argmax(rows[0].sampler.silenced(logits), axis=-1)).tolist()  # one model: what one may not say
    for place, row in enumerate(rows):
        if not row.sampler.plain:
            mine = row.sampler.adjust(logits[place : place + 1], row.before())
            (chosen[place],) = np.array(row.sampler.choose(mine)).tolist()
    return chosen


def batch_generate(
    model: Llama3V,
    tokens: Tokens,
    requests: Sequence[Request],
    max_tokens: int = 64,
    batch_size: int = 32,
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_context: int | None = None,
    prefill_step_size: int = PREFILL,
    done: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Answers to many requests, in their order, each as if it were asked alone; greedy by default.

    Requests of similar length are prefilled together; an answer that ends makes room for the next request.
    `sampling` (one, or one a request) replaces `max_tokens`; no row grows beyond `max_context` tokens; about
    `prefill_step_size` prompt tokens are processed at a time; `done` is told each answer as it ends. Timings count what
    ran beside an answer too. Raises ContextError as `Session.ask` does, before anything is decoded.
    """
    sampling = sampling or Sampling(max_tokens=max_tokens)
    each = [sampling] * len(requests) if isinstance(sampling, Sampling) else sampling
    rows = [
        new_row(model, tokens, render_request(model, tokens, request), request.pictures, how, most=max_context)
        for request, how in zip(requests, each, strict=True)
    ]
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i].row), reverse=True)
    running, place, answers = Running(model), {id(row): i for i, row in enumerate(rows)}, {}
    while waiting or running.rows:
        if waiting and len(running.rows) <= batch_size // 2:
            _admit(running, rows, waiting, batch_size, prefill_step_size)
        elif running.rows:
            for row, token in zip(running.rows, running.step(), strict=True):
                row.take(token)
        for row in running.rows:
            if row.writer.finish:
                answers[place[id(row)]] = row.answer(model)
                if done:
                    done(place[id(row)], answers[place[id(row)]])
        running.keep(lambda row: not row.writer.finish)
    return [answers[i] for i in range(len(rows))]


def _admit(running: Running, rows: Sequence[Row], waiting: list[int], batch_size: int, step: int) -> None:
    """Fill the batch from the end of `waiting` (the shortest), in groups that one prefill step takes."""
    while waiting and len(running.rows) < batch_size:
        group: list[Row] = []
        while waiting and len(running.rows) + len(group) < batch_size:
            if group and (len(group) + 1) * len(rows[waiting[-1]].row) > step:
                break
            group.append(rows[waiting.pop()])
            group[-1].started = perf_counter()
        if len(group) == 1:  # may be longer than one step
            prefill, token = Prefill(running.model, group[0]), None
            while token is None:
                token = prefill.advance(step)
            running.join(group[0], token, prefill.cache)
            group[0].take(token)
            continue
        for row, first in zip(group, running.prefill(group), strict=True):
            row.take(first)

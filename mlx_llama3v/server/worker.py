"""The one thread that computes: requests come and go while the others' answers are decoded.

Between two decoding steps it takes new requests, lets those go whose clients left or whose time is up, and
brings at most one request a bit further on its way into the batch: its pictures, then one step of its prompt.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from hashlib import sha256
from io import BytesIO
from time import monotonic, perf_counter

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_llama3v.config import Encoded
from mlx_llama3v.errors import UserError
from mlx_llama3v.inference.answer import Answer
from mlx_llama3v.inference.batch import Prefill, Request, Row, Running, new_row, render_request
from mlx_llama3v.inference.grammar import Grammar
from mlx_llama3v.inference.prefixes import Prefixes
from mlx_llama3v.inference.rows import embed_rest, place_keys
from mlx_llama3v.inference.session import Session
from mlx_llama3v.server.config import ServeConfig
from mlx_llama3v.server.metrics import Metrics
from mlx_llama3v.server.schema import ChatRequest, Refusal
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.vision.encode import Encoder

ENCODED_BYTES = 500_000_000  # of pictures' embeddings, kept by content
logger = logging.getLogger("mlx_llama3v.server")
Event = str | Answer | Exception  # text as it comes, then the answer or what went wrong


@dataclass(eq=False)
class Ticket:
    """One request on its way; `tell` gets its events, from the computing thread."""

    request: ChatRequest
    pictures: list[bytes]
    tell: Callable[[Event], None]
    deadline: float
    cancelled: bool = False  # set by whoever waits for it
    row: Row | None = None
    encode: float = 0.0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class Worker:
    """Answers tickets side by side."""

    def __init__(self, session: Session, config: ServeConfig) -> None:
        self.model, self.tokens, self.config = session.model, session.tokens, config
        self.encoder = _limited(session.encoder, config.max_pixels)
        self.metrics = Metrics()
        self._warm_up()
        self._prefixes = Prefixes(config.prefix_memory)
        self._encoded: OrderedDict[str, Encoded] = OrderedDict()
        self._waiting: deque[Ticket] = deque()
        self._arriving = 0
        self._tickets: dict[int, Ticket] = {}  # of running rows, by id(row)
        self._entering: tuple[Ticket, Prefill] | None = None
        self._running = Running(self.model)
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="llama3v-generation", daemon=True)

    def _warm_up(self) -> None:
        """Compute all that is lazy (rotary tables are): MLX's streams belong to the thread that made an array."""
        mx.eval(self.model(mx.array([[self.tokens.bos]])))
        if self.encoder is not None:
            side = self.encoder.vision.image_size
            buffer = BytesIO()
            Image.new("RGB", (side, side)).save(buffer, "PNG")
            picture = self.encoder.embed(buffer.getvalue())
            row = Request((Message("user", "", (0,)),), (picture,))
            mx.eval(embed_rest(self.model, render_request(self.model, self.tokens, row), [picture], 0))

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> None:
        """Answer what is there, take nothing more, and end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._tickets) + (self._entering is not None)

    def check_room(self) -> None:
        """Raises Refusal (429) where the queue is full."""
        if self._stopping:
            raise Refusal("the server is shutting down.", status=503)
        if self.load + self._arriving >= self.config.max_batch + self.config.max_queue:
            raise Refusal("too many requests wait already; try again in a moment.", status=429, code="queue_full")

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """A request whose body and pictures are still on their way has its place in the queue. Raises Refusal."""
        with self._wake:
            self.check_room()
            self._arriving += 1
        try:
            yield
        finally:
            with self._wake:
                self._arriving -= 1

    def submit(
        self, request: ChatRequest, pictures: list[bytes], tell: Callable[[Event], None], deadline: float
    ) -> Ticket:
        """Put a request into the queue. Raises Refusal where it is full."""
        ticket = Ticket(request, pictures, tell, deadline)
        with self._wake:
            self.check_room()
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self.load and not self._stopping:
                    self._wake.wait()
                if self._stopping and not self.load:
                    return
            try:
                self._turn()
            except Exception as error:  # one broken request must not end the server
                logger.exception("generation failed")
                self._fail_all(error)

    def _turn(self) -> None:
        self._let_go()
        if self._entering is None and self._waiting and len(self._running.rows) < self.config.max_batch:
            with self._wake:
                ticket = self._waiting.popleft()
            self._enter(ticket)
        if self._entering is not None:
            self._bring_in(*self._entering)
        if self._running.rows:
            self._decode()
        waiting, running = len(self._waiting), len(self._running.rows)
        self.metrics.gauges(waiting=waiting, running=running, prefix_bytes=self._prefixes.nbytes)

    def _let_go(self) -> None:
        """Forget requests whose client left, and end those whose time is up."""
        now = monotonic()
        with self._wake:
            gone = [ticket for ticket in self._waiting if ticket.cancelled or now > ticket.deadline]
            for ticket in gone:
                self._waiting.remove(ticket)
        if self._entering and (self._entering[0].cancelled or now > self._entering[0].deadline):
            gone.append(self._entering[0])
            self._entering = None
        over = [t for t in self._tickets.values() if t.cancelled or now > t.deadline]
        gone += over
        for ticket in over:
            self._tickets.pop(id(ticket.row))
        if over:
            self._running.keep(lambda row: id(row) in self._tickets)
        for ticket in gone:
            if ticket.cancelled:
                self.metrics.count("cancelled")
            else:
                ticket.tell(Refusal("the request took longer than the server allows.", status=504, code="timeout"))

    def _enter(self, ticket: Ticket) -> None:
        """Pictures, prompt and what is known of it; what the client did wrong ends the ticket."""
        try:
            started = perf_counter()
            shown = [image for said in ticket.request.messages for image in said.images]
            pictures = tuple(self._encode(c, i.whole) for c, i in zip(ticket.pictures, shown, strict=True))
            ticket.encode = perf_counter() - started
            count, messages = 0, []
            for said in ticket.request.messages:
                images = tuple(range(count, count + len(said.images)))
                count += len(images)
                messages.append(Message(said.role, said.text, images))
            row = render_request(self.model, self.tokens, Request(tuple(messages), pictures))
            mask, schema = None, ticket.request.schema
            if schema is not None:
                width = int(self.model.config.text_config["vocab_size"])
                mask = Grammar(self.tokens, schema, width)
            sampling, most = ticket.request.sampling, self.config.max_context
            ticket.row = new_row(self.model, self.tokens, row, pictures, sampling, mask, most)
            ticket.row.started = perf_counter()
            ticket.keys = place_keys(row, pictures, self.model)
            ticket.row.cached, cache = self._prefixes.find(ticket.keys)
            self._entering = ticket, Prefill(self.model, ticket.row, cache)
        except UserError as error:
            ticket.tell(error)
        except Exception as error:
            logger.exception("a request could not be prepared")
            ticket.tell(error)

    def _bring_in(self, ticket: Ticket, prefill: Prefill) -> None:
        token = prefill.advance(self.config.prefill_step_size)
        if token is None:
            return
        assert ticket.row is not None
        self._entering = None
        self._prefixes.add(ticket.keys, prefill.cache)
        self._tickets[id(ticket.row)] = ticket
        self._running.join(ticket.row, token, prefill.cache)
        self._hand_out(ticket, ticket.row.take(token))
        self._finish()

    def _decode(self) -> None:
        rows = list(self._running.rows)
        for row, token in zip(rows, self._running.step(), strict=True):
            self._hand_out(self._tickets[id(row)], row.take(token))
        self._finish()

    def _hand_out(self, ticket: Ticket, text: str) -> None:
        if text:
            ticket.tell(text)

    def _finish(self) -> None:
        """Rows whose answer has ended leave; the next turn will begin with what they hold."""
        for place, row in enumerate(self._running.rows):
            if row.writer.finish is None:
                continue
            ticket = self._tickets.pop(id(row))
            cache = self._running.extract(place)
            # The last token was chosen but did not run through the decoder.
            keys = np.concatenate([ticket.keys, np.array(row.writer.tokens, np.int64)])
            self._prefixes.add(keys[: min(len(keys), cache[0].offset)], cache)
            answer = row.answer(self.model, ticket.encode)
            self.metrics.answered(answer)
            ticket.tell(answer)
        self._running.keep(lambda row: row.writer.finish is None)

    def _encode(self, content: bytes, whole: bool) -> Encoded:
        """A picture's embeddings; where it is to stay `whole`, of its overview alone."""
        if self.encoder is None:
            raise Refusal("this model has no vision tower; ask without pictures.", "messages")
        encoder = copy(self.encoder)
        if whole:
            encoder.tiling = replace(encoder.tiling, max_slices=0)
        key = f"{sha256(content).hexdigest()} {encoder.tiling}"
        if key not in self._encoded:
            self._encoded[key] = encoder.embed(content)
            while sum(e.patches.nbytes for e in self._encoded.values()) > ENCODED_BYTES and len(self._encoded) > 1:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]

    def _fail_all(self, error: Exception) -> None:
        """After a failure of the decoder itself nothing that ran can go on."""
        failed = list(self._tickets.values()) + ([self._entering[0]] if self._entering else [])
        self._tickets, self._entering, self._running = {}, None, Running(self.model)
        for ticket in failed:
            ticket.tell(error)


def _limited(encoder: Encoder | None, max_pixels: int) -> Encoder | None:
    """The encoder with the server's own limit on pictures."""
    if encoder is None:
        return None
    limited = copy(encoder)
    limited.image = replace(encoder.image, max_pixels=min(max_pixels, encoder.image.max_pixels))
    return limited

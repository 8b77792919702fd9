"""The worker's events as OpenAI's answers: one object, or a stream of chunks."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from mlx_llama3v.errors import UserError
from mlx_llama3v.inference.answer import Answer
from mlx_llama3v.server.schema import ChatRequest, Refusal
from mlx_llama3v.server.worker import Event, Ticket

WATCH_SECONDS = 0.25  # how often a waiting request looks whether its client is there
REASONS = {"repetition": "length"}  # OpenAI's clients know no other word for an answer that was cut off


async def _next(request: Any, events: asyncio.Queue[Event]) -> Event | None:
    """The next event; None where the client left. A user's error becomes a Refusal, raised."""
    while True:
        event: Event | None
        try:
            event = await asyncio.wait_for(events.get(), WATCH_SECONDS)
        except TimeoutError:
            event = None
        if await request.is_disconnected():
            return None
        if event is None:
            continue
        if isinstance(event, Refusal):
            raise event
        if isinstance(event, UserError):
            raise Refusal(str(event), "messages")
        if isinstance(event, Exception):
            raise Refusal("the server failed to answer; its log says why.", status=500)
        return event


async def respond(
    request: Any, asked: ChatRequest, ticket: Ticket, events: asyncio.Queue[Event], model: str
) -> dict[str, Any] | AsyncIterator[str]:
    """The whole answer, or for streams its chunks: the first event is awaited, so that errors have a status."""
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
    event = await _next(request, events)
    if asked.stream:
        return _stream(request, asked, ticket, events, head, event)
    while event is not None and not isinstance(event, Answer):
        event = await _next(request, events)
    if not isinstance(event, Answer):
        raise Refusal("the client left.", status=499)
    choice = {"index": 0, "message": {"role": "assistant", "content": event.text, "refusal": None}, "logprobs": None}
    choices = [{**choice, "finish_reason": _reason(event)}]
    return {**head, "object": "chat.completion", "choices": choices, "usage": _usage(event), "llama3v": _extra(event)}


async def _stream(
    request: Any,
    asked: ChatRequest,
    ticket: Ticket,
    events: asyncio.Queue[Event],
    head: dict[str, Any],
    event: Event | None,
) -> AsyncIterator[str]:
    """Server-sent events: role, text, the reason it ended, the usage where wanted, and [DONE]."""

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _line({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while event is not None:
            if isinstance(event, Answer):
                yield chunk({}, _reason(event), llama3v=_extra(event))
                if asked.usage:
                    yield _line({**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(event)})
                yield "data: [DONE]\n\n"
                return
            yield chunk({"content": event})
            event = await _next(request, events)
    except Refusal as refusal:
        yield _line(refusal.body())
    finally:
        ticket.cancelled = True  # without effect where it has ended


def _line(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def _reason(answer: Answer) -> str:
    return REASONS.get(answer.finish_reason, answer.finish_reason)


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, said = answer.prompt_tokens + answer.cached_tokens, len(answer.tokens)
    cached = {"cached_tokens": answer.cached_tokens}
    counts = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
    return {**counts, "prompt_tokens_details": cached}


def _extra(answer: Answer) -> dict[str, Any]:
    """What OpenAI's answer has no place for."""
    times = {**vars(answer.timings), "first_token": answer.timings.first_token}
    reason, slices = answer.finish_reason, answer.slices
    return {"finish_reason": reason, "slices": slices, "visual_tokens": answer.visual_tokens, "timings": times}

"""The HTTP side: OpenAI's chat completions, models, health, metrics, and the page at `/`.

Every error has OpenAI's shape. Nothing here computes: requests become tickets of the worker's thread, and
their events come back through the event loop. FastAPI resolves annotations in this module's names, so it is
imported at the top here; only `cli/serve.py` imports this module, when it runs.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from time import monotonic
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mlx_llama3v.errors import UserError
from mlx_llama3v.inference.answer import Answer
from mlx_llama3v.server.config import ServeConfig
from mlx_llama3v.server.openapi import openapi
from mlx_llama3v.server.pictures import read_picture
from mlx_llama3v.server.schema import ChatRequest, Refusal, parse_chat, parse_json
from mlx_llama3v.server.worker import Event, Ticket, Worker
from mlx_llama3v.vision.image import image_size
from mlx_llama3v.vision.pool import pooled_layout
from mlx_llama3v.vision.tiling import plan

SCRIPTS = ("app.js", "markdown.js", "pictures.js")
PAGE = {"index.html": "text/html", "style.css": "text/css", **dict.fromkeys(SCRIPTS, "text/javascript")}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
WATCH_SECONDS = 0.25  # how often a waiting request looks whether its client is there
REASONS = {"repetition": "length"}  # OpenAI's clients know no other word for an answer that was cut off


def make_app(worker: Worker, config: ServeConfig, model: str) -> FastAPI:
    """The FastAPI application; it starts and stops the worker."""

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, title="mlx-llama3v")
    created = int(time.time())

    def refused(refusal: Refusal) -> JSONResponse:
        headers = {"Retry-After": "1"} if refusal.status in (429, 503) else None
        return JSONResponse(refusal.body(), refusal.status, headers)

    @app.exception_handler(HTTPException)
    async def _unknown(_: Request, error: HTTPException) -> JSONResponse:
        return refused(Refusal(f"{error.detail}.", status=error.status_code))

    @app.exception_handler(Refusal)
    async def _refused(_: Request, error: Refusal) -> JSONResponse:
        return refused(error)

    def admit(request: Request, *, key: bool = True) -> None:
        """Raises Refusal for a foreign host name (another site's name for this address) or a wrong key."""
        if _is_local(config.host) and not _is_local(_name(request.headers.get("host", ""))):
            raise Refusal("this server answers on this machine's own names only.", status=403)
        if key and config.api_key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, config.api_key.encode()):
                raise Refusal("the API key is missing or wrong.", status=401, code="invalid_api_key")

    async def read_json(request: Request, seconds: float) -> dict[str, Any]:
        """The body, within its limits. Another site's form cannot send this type unasked."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal("the request's Content-Type is not application/json.", status=415)
        body = bytearray()

        async def collect() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > config.max_body:
                    raise Refusal(f"the request is larger than {config.max_body} bytes.", status=413)

        try:
            await asyncio.wait_for(collect(), seconds)
        except TimeoutError:
            raise Refusal("the request did not arrive in time.", status=408) from None
        except ClientDisconnect:
            raise Refusal("the client left.", status=499) from None
        return parse_json(bytes(body))

    @app.get("/health")
    async def health(request: Request) -> Any:
        admit(request, key=False)
        return {"status": "ok", "model": model}

    @app.get("/metrics")
    async def metrics(request: Request) -> Any:
        admit(request)
        return PlainTextResponse(worker.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json")
    async def api(request: Request) -> Any:
        admit(request)
        return openapi(model)

    @app.get("/v1/models")
    async def models(request: Request) -> Any:
        admit(request)
        return {"object": "list", "data": [_model(model, created)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Any:
        admit(request)
        if name != model:
            raise Refusal(f"there is no model {name!r}; this is {model!r}.", "model", 404, "model_not_found")
        return _model(model, created)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        started = monotonic()
        try:
            admit(request)
            deadline = started + config.timeout
            with worker.arriving():
                asked = parse_chat(await read_json(request, config.timeout), config, model)
                urls = [url for message in asked.messages for url in message.images]
                pictures = [await _picture(url, config, deadline) for url in urls]
            events: asyncio.Queue[Event] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def tell(event: Event) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(events.put_nowait, event)

            ticket = worker.submit(asked, pictures, tell, deadline)
            try:
                answered = await _respond(request, asked, ticket, events, model)
            except BaseException:
                ticket.cancelled = True
                raise
            worker.metrics.count("requests", 'status="200"')
        except Refusal as refusal:
            worker.metrics.count("requests", f'status="{refusal.status}"')
            raise
        if isinstance(answered, dict):
            return JSONResponse(answered)
        return StreamingResponse(answered, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.post("/page/slices")
    async def slices(request: Request) -> Any:
        """How a picture will be split: sizes in pixels, and what it costs in tokens."""
        admit(request)
        values = await read_json(request, config.timeout)
        if values.keys() != {"image"} or not isinstance(values["image"], str):
            raise Refusal("expected {image: a data URI}.", "image")
        content = await asyncio.to_thread(read_picture, values["image"], config)
        return await asyncio.to_thread(_slices, worker, content)

    @app.get("/")
    async def page(request: Request) -> Any:
        admit(request, key=False)
        return _file("index.html")

    @app.get("/page/{name}")
    async def part(request: Request, name: str) -> Any:
        admit(request, key=False)
        if name not in PAGE:
            raise Refusal("Not Found.", status=404)
        return _file(name)

    def _file(name: str) -> Response:
        content = (files("mlx_llama3v.server") / "page" / name).read_bytes()
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(content, media_type=f"{PAGE[name]}; charset=utf-8", headers=headers)

    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origin), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


async def _picture(url: str, config: ServeConfig, deadline: float) -> bytes:
    try:
        return await asyncio.wait_for(asyncio.to_thread(read_picture, url, config), max(0.01, deadline - monotonic()))
    except TimeoutError:
        raise Refusal("the pictures did not arrive in time.", "image_url", 408) from None


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


async def _respond(
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


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mlx-llama3v"}


def _slices(worker: Worker, content: bytes) -> dict[str, Any]:
    encoder = worker.encoder
    if encoder is None:
        raise Refusal("this model has no vision tower; ask without pictures.", "image")
    try:
        size = image_size(content, encoder.image.max_pixels)
    except UserError as error:
        raise Refusal(str(error), "image") from error
    found = plan(*size, encoder.vision, encoder.tiling)
    layout, projector = found.layout, worker.model.config.projector_config
    tokens = sum(projector.num_tokens(grid) for grid in pooled_layout(layout, encoder.pool).grids)
    return {
        "size": size,
        "overview": found.overview_px,
        "tile": found.tile_px,
        "rows": layout.rows,
        "cols": layout.cols,
        "slices": len(layout.grids),
        "visual_tokens": tokens,
    }


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    return host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]


def _is_local(name: str) -> bool:
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

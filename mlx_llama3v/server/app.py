"""The HTTP side: OpenAI's chat completions, models, health, metrics, and the page at `/` (site.py).

Every error has OpenAI's shape. Nothing here computes: requests become tickets of the worker's thread, and
their events come back through the event loop. FastAPI resolves annotations in this module's names, so it is
imported at the top here; only `cli/serve.py` imports this module, when it runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from mlx_llama3v.server.config import ServeConfig
from mlx_llama3v.server.gate import Gate
from mlx_llama3v.server.openapi import openapi
from mlx_llama3v.server.pictures import read_picture
from mlx_llama3v.server.reply import respond
from mlx_llama3v.server.schema import Refusal, parse_chat
from mlx_llama3v.server.site import Site
from mlx_llama3v.server.worker import Event, Worker


def make_app(worker: Worker, config: ServeConfig, model: str) -> FastAPI:
    """The FastAPI application; it starts and stops the worker."""

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, title="mlx-llama3v")
    app.exception_handler(HTTPException)(_unknown)
    app.exception_handler(Refusal)(_refused)
    gate = Gate(config)
    About(worker, model, gate).add_to(app)
    Chat(worker, config, model, gate).add_to(app)
    Site(worker, config, gate).add_to(app)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origin), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


async def _unknown(request: Request, error: HTTPException) -> JSONResponse:
    return await _refused(request, Refusal(f"{error.detail}.", status=error.status_code))


async def _refused(_: Request, error: Refusal) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


class About:
    """The routes that say what this server is and how it does."""

    def __init__(self, worker: Worker, model: str, gate: Gate) -> None:
        self._worker, self._model, self._gate = worker, model, gate
        self._created = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics)
        app.get("/openapi.json")(self.api)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.one_model)

    async def health(self, request: Request) -> Any:
        self._gate.admit(request, key=False)
        return {"status": "ok", "model": self._model}

    async def metrics(self, request: Request) -> Any:
        self._gate.admit(request)
        return PlainTextResponse(self._worker.metrics.text(), media_type="text/plain; version=0.0.4")

    async def api(self, request: Request) -> Any:
        self._gate.admit(request)
        return openapi(self._model)

    async def models(self, request: Request) -> Any:
        self._gate.admit(request)
        return {"object": "list", "data": [self._described()]}

    async def one_model(self, request: Request, name: str) -> Any:
        self._gate.admit(request)
        if name != self._model:
            raise Refusal(f"there is no model {name!r}; this is {self._model!r}.", "model", 404, "model_not_found")
        return self._described()

    def _described(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "mlx-llama3v"}


class Chat:
    """The route that answers."""

    def __init__(self, worker: Worker, config: ServeConfig, model: str, gate: Gate) -> None:
        self._worker, self._config, self._model, self._gate = worker, config, model, gate

    def add_to(self, app: FastAPI) -> None:
        app.post("/v1/chat/completions")(self.chat)

    async def chat(self, request: Request) -> Any:
        started, count = monotonic(), self._worker.metrics.count
        try:
            self._gate.admit(request)
            answered = await self._answer(request, started + self._config.timeout)
            count("requests", 'status="200"')
        except Refusal as refusal:
            count("requests", f'status="{refusal.status}"')
            raise
        if isinstance(answered, dict):
            return JSONResponse(answered)
        return StreamingResponse(answered, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _answer(self, request: Request, deadline: float) -> dict[str, Any] | AsyncIterator[str]:
        """Read, submit and wait; see `respond`. The ticket is cancelled where that fails."""
        with self._worker.arriving():
            asked = parse_chat(await self._gate.read_json(request), self._config, self._model)
            urls = [image.url for message in asked.messages for image in message.images]
            pictures = [await _picture(url, self._config, deadline) for url in urls]
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self._worker.submit(asked, pictures, tell, deadline)
        try:
            return await respond(request, asked, ticket, events, self._model)
        except BaseException:
            ticket.cancelled = True
            raise


async def _picture(url: str, config: ServeConfig, deadline: float) -> bytes:
    try:
        return await asyncio.wait_for(asyncio.to_thread(read_picture, url, config), max(0.01, deadline - monotonic()))
    except TimeoutError:
        raise Refusal("the pictures did not arrive in time.", "image_url", 408) from None

"""The page at `/`, its files, and what it asks beside the API: how a picture will be split.

FastAPI resolves annotations in this module's names, so it is imported at the top.
"""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from mlx_llama3v.errors import UserError
from mlx_llama3v.server.config import ServeConfig
from mlx_llama3v.server.gate import Gate
from mlx_llama3v.server.pictures import read_picture
from mlx_llama3v.server.schema import Refusal
from mlx_llama3v.server.worker import Worker
from mlx_llama3v.vision.image import image_size
from mlx_llama3v.vision.pool import pooled_layout
from mlx_llama3v.vision.tiling import plan

SCRIPTS = ("app.js", "markdown.js", "pictures.js")
PAGE = {"index.html": "text/html", "style.css": "text/css", **dict.fromkeys(SCRIPTS, "text/javascript")}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Site:
    """The routes of the page. Its files are open; what costs time needs the key."""

    def __init__(self, worker: Worker, config: ServeConfig, gate: Gate) -> None:
        self._worker, self._config, self._gate = worker, config, gate

    def add_to(self, app: FastAPI) -> None:
        app.get("/")(self.page)
        app.get("/page/{name}")(self.part)
        app.post("/page/slices")(self.slices)

    async def page(self, request: Request) -> Any:
        self._gate.admit(request, key=False)
        return _file("index.html")

    async def part(self, request: Request, name: str) -> Any:
        self._gate.admit(request, key=False)
        if name not in PAGE:
            raise Refusal("Not Found.", status=404)
        return _file(name)

    async def slices(self, request: Request) -> Any:
        """How a picture will be split: sizes in pixels, and what it costs in tokens."""
        self._gate.admit(request)
        values = await self._gate.read_json(request)
        if values.keys() != {"image"} or not isinstance(values["image"], str):
            raise Refusal("expected {image: a data URI}.", "image")
        content = await asyncio.to_thread(read_picture, values["image"], self._config)
        return await asyncio.to_thread(_slices, self._worker, content)


def _file(name: str) -> Response:
    content = (files("mlx_llama3v.server") / "page" / name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response(content, media_type=f"{PAGE[name]}; charset=utf-8", headers=headers)


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

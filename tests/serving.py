"""A tiny random model behind a real server on a free port, for the server's tests."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlx_llama3v import checkpoint
from mlx_llama3v.inference import Session, load
from mlx_llama3v.server.config import ServeConfig
from mlx_llama3v.vision.siglip import VisionTower
from tests.hf_llama import tiny_tokenizer, write_tokenizer
from tests.tiny_model import tiny_model, tiny_tokens

MODEL = "tiny"
# The command line in a process of its own, with a model that never ends an answer by itself.
ENDLESS_CLI = """
from mlx_llama3v.cli import main
from mlx_llama3v.text.tokens import Tokens
begin = Tokens.__init__
def without_stop(self, *args, **more):
    begin(self, *args, **more)
    self.stop = frozenset()
Tokens.__init__ = without_stop
main()
"""


def make_directory(path: Path, context: int = 4000) -> Path:
    """A model directory with random weights."""
    model, tokens = tiny_model(max_position_embeddings=context), tiny_tokens()
    tower = VisionTower(model.config.vision_config)
    config = replace(model.config, marker_ids=tokens.marker_ids)
    weights = [*tree_flatten(model.parameters())]
    weights += [(f"vision_tower.{name}", value * 3) for name, value in tree_flatten(tower.parameters())]
    write_tokenizer(path.parent / "files", tiny_tokenizer())
    files = {"tokenizer.json": path.parent / "files" / "tokenizer.json"}
    checkpoint.save_model(path, config, weights, files=files)
    return path


def png(seed: int = 0, size: tuple[int, int] = (70, 40)) -> bytes:
    """A picture of a few random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 255, (2, 3, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def question(text: str, *images: bytes | str) -> dict[str, Any]:
    """A user message."""
    urls = [image if isinstance(image, str) else data_uri(image) for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    worker: Any
    session: Session


def post(served: Served, body: Any, **more: Any):
    """A chat request; its response."""
    import httpx

    more.setdefault("timeout", 20)
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, **more)


def asked(*images: bytes | str, **more: Any) -> dict[str, Any]:
    return {"messages": [question("What?", *images)], "max_tokens": 3, **more}


@contextmanager
def serving(directory: Path, **limits: Any) -> Iterator[Served]:
    """Serve a model directory on a free port, in a thread of this process."""
    import uvicorn

    from mlx_llama3v.server.app import make_app
    from mlx_llama3v.server.worker import Worker

    config, session = ServeConfig(**limits), load(directory)
    worker = Worker(session, config)
    settings = uvicorn.Config(make_app(worker, config, MODEL), port=0, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ends = time.monotonic() + 20
    while not server.started and time.monotonic() < ends:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", worker, load(directory))
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def endless(served: Served) -> Iterator[None]:
    """The model never ends an answer by itself."""
    stop, served.worker.tokens.stop = served.worker.tokens.stop, frozenset()
    yield
    served.worker.tokens.stop = stop


def wait_until(true: Any, seconds: float = 10.0) -> bool:
    """Whether `true()` comes to hold."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if true():
            return True
        time.sleep(0.02)
    return False

"""From a model directory to a session, and the two shortest ways to an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_llama3v import checkpoint
from mlx_llama3v.encoder import load_encoder
from mlx_llama3v.inference.sampling import Sampling
from mlx_llama3v.inference.session import Memory, Picture, Session
from mlx_llama3v.platform import wire_memory
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.text.tokens import Tokens


def load(
    model: str | Path, run: str | Path | None = None, *, system: str | None = None, memory: Memory | None = None
) -> Session:
    """Open a model directory (or Hub repo id), with what a training run changed on top.

    Raises CheckpointError for a directory that is missing, incomplete or not made by `convert`.
    """
    wire_memory()
    path = checkpoint.resolve(model)
    config = checkpoint.load_config(path)
    tokens = Tokens.load(path, config.marker_ids, config.eos_token_ids, config.prompt_layout)
    llama3v = checkpoint.load_model(path)
    if run is not None:
        checkpoint.check_run(path, run)
        checkpoint.load_run(llama3v, Path(run))
    encoder = load_encoder(path) if read_tensors(path, ("vision_tower.",)) else None
    if encoder is not None:
        seen = checkpoint.trained_on(config, run)
        encoder.pool, encoder.tiling = seen.patch_pool, seen.tiling
    return Session(llama3v, tokens, encoder, system, memory)


def stream(session: Session, prompt: str, images: Sequence[Picture] = (), **sampling: Any) -> Iterator[str]:
    """One answer in a fresh conversation, as text that arrives; keywords are Sampling's fields."""
    session.reset()
    for piece in session.ask(prompt, images, Sampling(**sampling)):
        if piece.text:
            yield piece.text


def generate(session: Session, prompt: str, images: Sequence[Picture] = (), **sampling: Any) -> str:
    """One answer in a fresh conversation; keywords are Sampling's fields."""
    return "".join(stream(session, prompt, images, **sampling))

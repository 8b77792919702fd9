"""A picture and a question through a model directory, as chat does it: logits of the prompt, and the greedy answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_llama3v.inference import Sampling, Session, embed_rows, load
from mlx_llama3v.text.prompt import Message, render


def answer(directory: Path, image: Path, question: str, max_tokens: int = 8) -> tuple[np.ndarray, list[int]]:
    """Logits [L, V] of the whole prompt, and the ids that greedy decoding gives (without the stop token)."""
    session = load(directory)
    return prompt_logits(session, image, question), greedy(session, image, question, max_tokens)


def prompt_logits(session: Session, image: Path, question: str) -> np.ndarray:
    assert session.encoder is not None
    encoded = session.encoder.embed(image)
    row = render(
        [Message("user", question, (0,))],
        [encoded.layout],
        session.tokens,
        session.model.config.projector_config,
        generate=True,
    )
    ids, vectors = embed_rows(session.model, [row], [[encoded]])
    return np.array(session.model(ids, None, vectors))[0]


def greedy(session: Session, image: Path, question: str, max_tokens: int = 8) -> list[int]:
    pieces = list(session.ask(question, [image], Sampling(max_tokens=max_tokens)))
    assert pieces[-1].answer is not None
    return list(pieces[-1].answer.tokens)


def without_stop(tokens: list[int], stop: frozenset[int]) -> list[int]:
    """An answer as ours gives it: up to its stop token."""
    return tokens[: next((n for n, token in enumerate(tokens) if token in stop), len(tokens))]


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference. Not a relative one: that hides the wrong GELU (1.1e-4 here, 4e-5 relative)."""
    return float(np.abs(a - b).max())

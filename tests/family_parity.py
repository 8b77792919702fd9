"""A picture and a question through a model directory, as chat does it: prompt, logits, greedy answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_llama3v.inference import Sampling, Session, embed_rows, load
from mlx_llama3v.text.prompt import FIRST_VISUAL, Message, render

VISUAL = -1  # stands for a visual token among ids


class Answered(NamedTuple):
    """What a model did with a picture and a question."""

    logits: np.ndarray  # [L, V] of the whole prompt
    tokens: list[int]  # the greedy answer, without its stop token
    ids: list[int]  # of the prompt, VISUAL where a visual token stands


def answer(directory: Path, image: Path | Sequence[Path], question: str, max_tokens: int = 8) -> Answered:
    """Ours, from a model directory; several pictures come in one turn."""
    session, images = load(directory), [image] if isinstance(image, Path) else list(image)
    logits, ids = prompted(session, images, question)
    return Answered(logits, greedy(session, images, question, max_tokens), ids)


def agree(found: Answered, expected: Answered) -> None:
    """The same prompt, logits within 1e-4 and the same answer, which is not empty."""
    assert found.ids == expected.ids
    assert found.logits.shape == expected.logits.shape
    assert gap(found.logits, expected.logits) <= 1e-4
    assert found.tokens == expected.tokens and found.tokens


def prompted(session: Session, images: Sequence[Path], question: str) -> tuple[np.ndarray, list[int]]:
    """Logits [L, V] and ids of a prompt."""
    assert session.encoder is not None
    encoded = [session.encoder.embed(image) for image in images]
    row = render(
        [Message("user", question, tuple(range(len(images))))],
        [picture.layout for picture in encoded],
        session.tokens,
        session.model.config.projector_config,
        generate=True,
    )
    ids, vectors = embed_rows(session.model, [row], [encoded])
    logits = np.array(session.model(ids, None, vectors))[0]
    return logits, np.where(row.source >= FIRST_VISUAL, VISUAL, row.ids).tolist()


def prompt_logits(session: Session, image: Path, question: str) -> np.ndarray:
    """Logits [L, V] of a prompt with one picture."""
    return prompted(session, [image], question)[0]


def greedy(session: Session, images: Path | Sequence[Path], question: str, max_tokens: int = 8) -> list[int]:
    """The ids of the greedy answer."""
    pictures = [images] if isinstance(images, Path) else list(images)
    pieces = list(session.ask(question, pictures, Sampling(max_tokens=max_tokens)))
    assert pieces[-1].answer is not None
    return list(pieces[-1].answer.tokens)


def without_stop(tokens: list[int], stop: frozenset[int]) -> list[int]:
    """An answer as ours gives it: up to its stop token."""
    return tokens[: next((n for n, token in enumerate(tokens) if token in stop), len(tokens))]


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference. Not a relative one: that hides the wrong GELU (1.1e-4 here, 4e-5 relative)."""
    return float(np.abs(a - b).max())

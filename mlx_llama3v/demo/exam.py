"""The demo's exam: questions about unseen pictures, asked as a user would, and once more with the wrong picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_llama3v.config import Encoded
from mlx_llama3v.demo.dataset import EXAM_KINDS, Exam
from mlx_llama3v.inference import Request, batch_generate
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.vision.encode import Encoder

MAX_ANSWER = 12  # tokens; every right answer is shorter


@dataclass(frozen=True)
class KindScore:
    """Exact-match accuracy of one question kind: with the right picture, and blind."""

    kind: str
    score: float
    blind: float
    n: int


@dataclass(frozen=True)
class Result:
    """The whole exam. `answers` are in the order of the questions."""

    kinds: tuple[KindScore, ...]
    overall: float
    blind: float
    small_text_split: float
    small_text_unsplit: float
    answers: tuple[str, ...]


def encode_all(encoder: Encoder, paths: Sequence[Path], batch_size: int = 32) -> list[Encoded]:
    """Fresh embeddings of many pictures, slices of like shape together."""
    import numpy as np

    prepared = [encoder.prepare(path) for path in paths]
    slices = [pair for layout, patches in prepared for pair in zip(layout.grids, patches, strict=True)]
    encoded = iter(encoder.encode(slices, batch_size))
    return [Encoded(layout, np.concatenate([next(encoded) for _ in layout.grids])) for layout, _ in prepared]


def sit(model: Llama3V, tokens: Tokens, split: Encoder, unsplit: Encoder, images: Path, exam: Sequence[Exam]) -> Result:
    """Put every question three times: with its picture, with another's, and (small text) without splitting."""
    pictures = encode_all(split, [images / question.image for question in exam])
    answers = _ask(model, tokens, exam, pictures)
    wrong = [pictures[index] for index in _others(exam)]
    blind = _ask(model, tokens, exam, wrong)
    small = [question for question in exam if question.kind == "small text"]
    whole = encode_all(unsplit, [images / question.image for question in small])
    unsplit_answers = _ask(model, tokens, small, whole)
    kinds = []
    for kind in EXAM_KINDS:
        rows = [index for index, question in enumerate(exam) if question.kind == kind]
        if rows:
            chosen = [exam[index] for index in rows]
            score = _accuracy(chosen, [answers[index] for index in rows])
            kinds.append(KindScore(kind, score, _accuracy(chosen, [blind[index] for index in rows]), len(rows)))
    return Result(
        tuple(kinds),
        _accuracy(exam, answers),
        _accuracy(exam, blind),
        next((kind.score for kind in kinds if kind.kind == "small text"), 0.0),
        _accuracy(small, unsplit_answers),
        tuple(answers),
    )


def _ask(model: Llama3V, tokens: Tokens, exam: Sequence[Exam], pictures: Sequence[Encoded]) -> list[str]:
    requests = [
        Request((Message("user", question.question, (0,)),), (picture,))
        for question, picture in zip(exam, pictures, strict=True)
    ]
    return [answer.text.strip() for answer in batch_generate(model, tokens, requests, MAX_ANSWER)]


def _others(exam: Sequence[Exam]) -> list[int]:
    """For each question the index of another one's picture, of the same kind of scene so that it makes sense."""
    others = list(range(len(exam)))
    for kind in {question.scene_kind for question in exam}:
        rows = [index for index, question in enumerate(exam) if question.scene_kind == kind]
        for place, index in enumerate(rows):
            others[index] = rows[(place + max(1, len(rows) // 2)) % len(rows)]
    return others


def _accuracy(exam: Sequence[Exam], answers: Sequence[str]) -> float:
    right = sum(question.answer == answer for question, answer in zip(exam, answers, strict=True))
    return right / max(1, len(exam))

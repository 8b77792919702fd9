"""Draw a data set of the tiny world: pictures as files, and LLaVA JSON for both stages and the exam."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.draw import render
from mlx_llama3v.demo.scenes import QA, Scene

# Of scenes.KINDS: reading is what a projector learns last, so there is more to read than in the sampler's own mix.
TRAIN_WEIGHTS = (3, 8, 5, 3)
EXAM_KINDS = ("colour", "shape", "place", "size", "count", "word", "number", "chart", "small text")


@dataclass(frozen=True)
class Exam:
    """One question about one unseen picture; `kind` is one of EXAM_KINDS."""

    image: str
    scene_kind: str
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class DataSet:
    """Files of a drawn data set."""

    images: Path
    captions: Path  # stage pretrain
    conversations: Path  # stage sft
    exam: tuple[Exam, ...]


def draw(
    directory: Path,
    count: int,
    exam_count: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> DataSet:
    """Draw `count` training pictures and an exam of `exam_count` questions about others, seeded.

    Pictures go to `directory/images` (PNG and JPEG), records to captions.json, train.json and exam.json.
    `progress(done, total)` counts pictures.
    """
    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = Random(f"train-{seed}")
    total = count + exam_count
    captions, conversations = [], []
    for index in range(count):
        scene = scenes.sample(rng, rng.choices(scenes.KINDS, weights=TRAIN_WEIGHTS)[0])
        name = _save(scene, images, f"train-{index:05d}", rng)
        captions.append(_record(name, [("<image>", scenes.caption(scene))]))
        asked = scenes.questions(scene)
        turns = [(qa.question, qa.answer) for qa in rng.sample(asked, min(len(asked), 5))]
        turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        conversations.append(_record(name, turns))
        if progress:
            progress(index + 1, total)
    exam = _draw_exam(images, exam_count, Random(f"exam-{seed}"), lambda n: progress and progress(count + n, total))
    for path, values in (
        ("captions.json", captions),
        ("train.json", conversations),
        ("exam.json", [vars(question) for question in exam]),
    ):
        (directory / path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return DataSet(images, directory / "captions.json", directory / "train.json", exam)


def _draw_exam(images: Path, count: int, rng: Random, progress: Callable[[int], Any]) -> tuple[Exam, ...]:
    """One question a picture, the kinds in turn, so that every kind has the same weight."""
    exam: list[Exam] = []
    while len(exam) < count:
        wanted = EXAM_KINDS[len(exam) % len(EXAM_KINDS)]
        scene = scenes.sample(rng)
        asked: list[QA] = [qa for qa in scenes.questions(scene) if qa.kind == wanted]
        if asked:
            qa = rng.choice(asked)
            name = _save(scene, images, f"exam-{len(exam):05d}", rng)
            exam.append(Exam(name, scene.kind, wanted, qa.question, qa.answer))
            progress(len(exam))
    return tuple(exam)


def _save(scene: Scene, images: Path, stem: str, rng: Random) -> str:
    if rng.random() < 0.5:
        name = f"{stem}.png"
        render(scene).save(images / name)
    else:
        name = f"{stem}.jpg"
        render(scene).save(images / name, quality=92)
    return name


def _record(image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": Path(image).stem, "image": image, "conversations": said}

"""gallery.png: unseen pictures with question, answer and truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_llama3v.demo.dataset import Exam


def choose(exam: Sequence[Exam], count: int) -> list[int]:
    """Indices of `count` questions, the kinds in turn; right and wrong answers as they come."""
    return list(range(min(count, len(exam))))


def draw_gallery(path: Path, images: Path, exam: Sequence[Exam], answers: Sequence[str], count: int = 24) -> None:
    """Write a sheet of pictures; wrong answers are red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    chosen = choose(exam, count)
    columns = 6
    rows = -(-len(chosen) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(columns * 2.2, rows * 2.5), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, chosen, strict=False):
        question, answer = exam[index], answers[index]
        with Image.open(images / question.image) as picture:
            axis.imshow(picture.convert("RGB"))
        right = answer == question.answer
        text = answer if right else f"{answer or '(nothing)'}  (truth: {question.answer})"
        axis.set_title(f"{question.question}\n{text}", fontsize=7, color="#0a6b2d" if right else "#b00020", wrap=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

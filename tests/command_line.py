"""The command line run in this process, and what a user has after `convert` and `embed`, for the commands' tests."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_llama3v.cli.app import run
from mlx_llama3v.demo.dataset import DataSet, draw
from mlx_llama3v.weights import TINY


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process."""

    def call(*args: object, stdin: str | bytes = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["llama3v-mlx", *map(str, args)])
        content = stdin if isinstance(stdin, bytes) else stdin.encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        sys.stderr.reconfigure(errors="backslashreplace")  # as the real one is
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        status = 0
        try:
            run()
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return Outcome(status, said.out, said.err)

    return call


def refused(outcome: Outcome, *words: str) -> None:
    """One sentence that names what was wrong."""
    assert outcome.status == 1, outcome
    assert "Traceback" not in outcome.err
    sentence = outcome.err[outcome.err.index("error: ") :].strip()
    assert "\n" not in sentence, sentence
    for word in words:
        assert word in sentence, sentence


@dataclass(frozen=True)
class World:
    """Everything a user has after convert and embed."""

    data: DataSet
    model: Path
    store: Path
    picture: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from mlx_llama3v.storing import embed_data
    from mlx_llama3v.weights.convert import convert  # imports torch

    root = tmp_path_factory.mktemp("world")
    data = draw(root / "data", 8, 9, seed=0)
    convert(TINY / "siglip", TINY / "llama", root / "model")
    embed_data(root / "model", data.captions, root / "store", image_folder=data.images)
    yield World(data, root / "model", root / "store", data.images / "train-00000.png")


def first_picture(world: World) -> Path:
    return sorted(world.data.images.iterdir())[0]

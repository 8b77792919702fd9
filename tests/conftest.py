"""Shared by all tests: the BLAS is loaded before mlx.core, and nothing reaches the network.

`make test` runs as many test processes as there are cores (pytest-xdist): each keeps to one thread then.
"""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import pytest

import mlx_llama3v  # noqa: F401
from tests.command_line import cli, world  # noqa: F401  (fixtures)


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durability is tested in test_checkpoint.py; waiting for the disk elsewhere would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"

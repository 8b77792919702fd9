"""A run directory is written by one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_llama3v.embeddings.lock import Lock
from mlx_llama3v.errors import StoreError
from tests.tiny_run import make_store, run, settings


def test_a_run_is_written_by_one_process(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    lock = Lock(tmp_path / "run")
    with pytest.raises(StoreError, match="is being written by process"):
        run(settings(iters=2), store, tmp_path / "run")
    lock.release()
    run(settings(iters=2), store, tmp_path / "run")

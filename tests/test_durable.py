"""fsync as each system has it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_llama3v.durable import sync


@pytest.mark.parametrize("known", [True, False])
def test_macos_is_asked_to_empty_the_drives_cache(known: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """F_FULLFSYNC where the volume knows it, else fsync."""
    asked: list[Any] = []

    def command(descriptor: int, code: int) -> None:
        asked.append(code)
        if not known:
            raise OSError("not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", command)
    monkeypatch.setattr(os, "fsync", lambda descriptor: asked.append("fsync"))
    (tmp_path / "file").write_text("")
    sync(tmp_path / "file")
    assert asked == ([51] if known else [51, "fsync"])


def test_only_a_directory_may_refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError("not supported")

    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "file").write_text("")
    sync(tmp_path)
    with pytest.raises(OSError, match="not supported"):
        sync(tmp_path / "file")

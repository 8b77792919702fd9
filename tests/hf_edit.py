"""Checkpoints on disk, spoilt or varied for a test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx


def edit(directory: Path, change: Callable[[dict[str, mx.array]], object]) -> Path:
    """Rewrite model.safetensors of a checkpoint after `change`."""
    weights = mx.load(str(directory / "model.safetensors"))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    return directory


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    held = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}

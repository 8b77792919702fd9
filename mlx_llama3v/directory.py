"""Directories that are written whole or not at all: built beside their place under a hidden name, then renamed.

A killed command leaves the hidden one, `.NAME.partial`. The system's lock on it tells whether its writer still lives;
the next one that writes NAME clears it, and others are named by `leftovers`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from mlx_llama3v.durable import sync
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import read_json

# What a checkpoint consists of, beside weights: also what is copied, and what may be replaced.
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model",
    "chat_template*", "generation_config.json",
)  # fmt: skip
LEGAL_FILES = ("LICENSE*", "USE_POLICY*", "NOTICE*")
MODEL_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "model*.safetensors*")
_OURS = (*MODEL_FILES, *TOKENIZER_FILES, *LEGAL_FILES, "README.md", "siglip", ".*")


def check_output(directory: str | Path) -> Path:
    """The absolute path of an output directory that may be written: absent, empty, or a model directory.

    Raises CheckpointError otherwise, also where a model directory holds files that saving does not write:
    they would be lost.
    """
    path = Path(directory).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; expected a directory to write the model to.")
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if not names:
        return path
    config = path / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != "llama3v":
        raise CheckpointError(f"{path} is not empty and not a model directory of ours; it is not overwritten.")
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in _OURS)]
    if foreign:
        raise CheckpointError(f"{path} also holds {', '.join(foreign)}; move that away, it would be overwritten.")
    return path


@contextmanager
def write_directory(directory: str | Path) -> Iterator[Path]:
    """As `replacing`, for what is not a model directory: `directory` must be absent or empty."""
    path = Path(directory).expanduser().resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists; expected a new or empty directory to write to.")
    with replacing(path) as partial:
        yield partial


@contextmanager
def replacing(directory: str | Path) -> Iterator[Path]:
    """A new, empty directory beside `directory` that takes its place when the block ends without an error.

    Raises CheckpointError (see `check_output`), also where another process is writing `directory`.
    """
    target = check_output(directory)
    # Fixed names: the next run clears what a killed one left.
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    if partial.is_dir() and not _unlocked(partial):
        raise CheckpointError(f"{target} is being written by another process; wait for it, or choose another name.")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield partial
        sync(partial)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
        sync(target.parent)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the system's lock, which ends with this process; False where another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network disk without locks: nobody is told of anybody
        return True
    return True


def _unlocked(partial: Path) -> bool:
    """Whether nobody writes a partial directory any more."""
    try:
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def leftovers(folder: Path) -> list[tuple[Path, int]]:
    """What killed commands left in `folder`: partial directories that nobody writes any more, and their bytes."""
    found = []
    for path in sorted(folder.glob(".*.partial")):
        ours = path.is_dir() and any(file.suffix in (".safetensors", ".gguf") for file in path.iterdir())
        if ours and _unlocked(path):
            found.append((path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())))
    return found

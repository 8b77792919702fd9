"""What a full disk, a read-only directory or a kill at any step of a write does to a store: nothing made is lost."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_llama3v.embeddings import shard
from mlx_llama3v.embeddings.tools import prune
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import StoreError
from tests.test_store import COUNT, FINGERPRINT, contents, expected, files, fill, picture, sha


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["flush", "_view"])  # at the end, and in the middle of writing
def test_a_full_disk_loses_nothing_that_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    fill(tmp_path, range(4))
    before = files(tmp_path)
    writer = StoreWriter(tmp_path, FINGERPRINT, shard_bytes=1 << 20)
    writer.add("4.jpg", sha(4), picture(4))
    real: Callable[..., Any] = getattr(shard, call)
    calls = iter(range(100))

    def failing(*args: Any) -> Any:
        return full_disk() if call == "flush" or next(calls) > 9 else real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shard, call, failing)
        with pytest.raises(StoreError) as caught:
            writer.flush()
    assert "No space left on device" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == before and contents(tmp_path) == expected(range(4))
    writer.close()  # room again: what waited is still there
    assert contents(tmp_path) == expected(range(5))


def test_a_full_disk_ends_the_block_with_that_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def failing(*_: object) -> None:
        tries.append(1)
        full_disk()

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="No space left"):
        with StoreWriter(tmp_path, FINGERPRINT, shard_bytes=1) as writer:
            patch.setattr(shard, "flush", failing)
            writer.add("0.jpg", sha(0), picture(0))
        pytest.fail("not raised")
    assert tries == [1]  # the end of the block does not try again
    fill(tmp_path, range(1))
    assert contents(tmp_path) == expected(range(1))


def test_prune_makes_room_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock holds without a text in it; what was begun and what loses all goes before anything is written."""
    fill(tmp_path, range(12))
    (tmp_path / ".shard-00009.safetensors.1.tmp").touch()
    before, whole = files(tmp_path), {name: contents(tmp_path)[name] for name in ("0.jpg", "11.jpg")}
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full_disk)
        patch.setattr(shard, "flush", full_disk)
        with pytest.raises(StoreError, match="No space left on device"):
            prune(tmp_path, whole)
    assert len(files(tmp_path)) == 3 < len(before) - 1  # the manifest, and the two that lose a part
    assert {name: contents(tmp_path)[name] for name in whole} == whole
    prune(tmp_path, whole)
    assert contents(tmp_path) == whole


def test_an_exception_in_the_block_keeps_what_is_complete(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path, FINGERPRINT) as writer:
        writer.add("0.jpg", sha(0), picture(0))
        raise KeyboardInterrupt
    assert contents(tmp_path) == expected(range(1))


# A writer in a process of its own, that can kill itself inside the n-th call of a function of `os`.
def test_a_directory_that_turns_read_only_within_a_write_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    fill(tmp_path, range(4))
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # what was begun cannot be taken back either
    with pytest.raises(StoreError, match="Permission denied"):
        fill(tmp_path, range(8))
    monkeypatch.undo()
    fill(tmp_path, range(8))
    assert contents(tmp_path) == expected(range(8)) and not [*tmp_path.glob(".*.tmp")]


CHILD = """
import os, signal, sys
from pathlib import Path
from typing import Any
import tests.test_store_disk as t
from mlx_llama3v.embeddings import shard
path, call, at, pause = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
if call:
    module = os if call == "replace" else shard
    real, count = getattr(module, call), iter(range(10**9))
    def dying(*args, **kwargs):
        if next(count) == at: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, call, dying)
print("go", flush=True)
with t.StoreWriter(path, t.FINGERPRINT, shard_bytes=600) as writer:
    for seed in range(t.COUNT):
        if pause: t.time.sleep(pause)
        if not writer.has(f"{seed}.jpg"):
            writer.add(f"{seed}.jpg", t.sha(seed), t.picture(seed))
"""


def child(path: Path, call: str = "", at: int = -1, pause: float = 0.0) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CHILD, str(path), call, str(at), str(pause)]
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("call", "at"),
    [("flush", 0), ("_view", 15), ("flush", 4), ("replace", 3), ("sync", 5)],
    ids=["before the manifest", "in a shard", "before fsync", "before rename", "after rename"],
)
def test_killed_at_each_step_of_a_write(tmp_path: Path, call: str, at: int) -> None:
    process = child(tmp_path, call, at)
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert any(name.endswith(".tmp") for name in files(tmp_path)) is (call != "sync")
    if at:
        have = contents(tmp_path)
        assert have == expected(range(len(have))) and len(have) < COUNT
    fill(tmp_path, range(COUNT))
    assert contents(tmp_path) == expected(range(COUNT))
    fill(tmp_path.with_name("whole"), range(COUNT))
    assert files(tmp_path) == files(tmp_path.with_name("whole"))


def test_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    chance, kills, longest = random.Random(5), 0, 0
    for _ in range(40):
        process = child(tmp_path, pause=0.001)
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        time.sleep(chance.uniform(0, 0.06))
        process.kill()
        process.communicate(timeout=60)
        kills += process.returncode == -9
        if (tmp_path / "manifest.json").exists():
            have = contents(tmp_path)
            assert have == expected(range(len(have)))  # a beginning, whole and in order
            assert len(have) >= longest
            longest = len(have)
        if kills >= 5:
            break
    assert kills >= 3
    fill(tmp_path, range(COUNT))
    assert contents(tmp_path) == expected(range(COUNT))


def test_a_store_that_outlives_a_program_says_nothing(tmp_path: Path) -> None:
    """When Python ends, modules are emptied while it still holds open files: here that of `os`."""
    fill(tmp_path, range(2))
    code = (
        "import os, sys; from mlx_llama3v.embeddings.store import Store; os.kept = Store(sys.argv[1]); "
        "os.kept.read_batch(['0.jpg'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True, check=True)
    assert not done.stderr

"""One writer a store: a lock file that says who holds it.

The lock is the system's (flock): it ends with its process, however that ends, so the lock of a dead process is
simply taken over. The file's text only serves the sentence for the second writer. A text that names another host
is believed even where the system's lock is free: not every network file system tells hosts of each other's locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_llama3v.errors import StoreError

LOCK = ".lock"


class Lock:
    """Held from construction to `release`. Raises StoreError that names the holder, or that it cannot be written."""

    def __init__(self, path: Path) -> None:
        file = path / LOCK
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from error
        try:
            self._take(path, file)
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = -1
            raise

    def _take(self, path: Path, file: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{path} is being written by {_who(_read(self._descriptor))}; wait for it or stop it."
            ) from error
        except OSError as error:
            raise StoreError(f"{file} cannot be locked: {error.strerror or error}; use a local disk.") from error
        holder = _read(self._descriptor)
        if holder and holder.get("host") != platform.node() and holder.get("machine") != _machine():
            raise StoreError(
                f"{path} is being written by {_who(holder)}; wait for it, or delete {file} if that process has ended."
            )
        me = {"pid": os.getpid(), "host": platform.node(), "machine": _machine()}
        self._write(json.dumps(me | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())

    def release(self) -> None:
        """Let other writers in. A second call does nothing."""
        if self._descriptor >= 0:
            try:
                self._write(b"")
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    @property
    def held(self) -> bool:
        """Whether it was not released yet."""
        return self._descriptor >= 0

    def _write(self, text: bytes) -> None:
        with suppress(OSError):  # a disk that is full, gone or read-only now: the system's lock holds and ends as well
            os.ftruncate(self._descriptor, 0)
            if text:
                os.pwrite(self._descriptor, text, 0)


def _read(descriptor: int) -> dict[str, Any]:
    """Who holds it, or {} where the file does not say."""
    try:
        values = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, OSError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _machine() -> str:
    """This machine, also when a network gave it another host name."""
    return f"{uuid.getnode():x}"

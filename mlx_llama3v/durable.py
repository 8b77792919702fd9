"""What survives a power cut: files and renames on the disk when a call returns, as far as a system can promise it."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def flush(descriptor: int) -> None:
    """fsync of an open file; on macOS that alone leaves the data in the drive's cache. Raises OSError."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # network volumes do not know it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync(path: Path) -> None:
    """`flush` of a file, or of a directory after a rename: that is atomic everywhere, and durable where it can be.

    Raises OSError for a file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if path.is_dir():
            with suppress(OSError):  # some file systems cannot
                flush(descriptor)
        else:
            flush(descriptor)
    finally:
        os.close(descriptor)

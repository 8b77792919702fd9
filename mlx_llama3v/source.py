"""Where a picture's bytes come from: a file of its own, or a value that reads them out of something larger.

The values are in data/sources.py and data/hf.py; what opens pictures knows only this.
"""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from mlx_llama3v.errors import size


class Held(Protocol):
    """A picture that is no file of its own. Small, frozen and picklable, so that worker processes can open it."""

    def read(self) -> bytes:
        """All bytes of the picture. Raises OSError."""

    def __str__(self) -> str:
        """What messages call it."""


Source: TypeAlias = Path | Held
MOST_BYTES = 10**9  # of a picture


@dataclass(frozen=True)
class Loaded:
    """A picture whose bytes are here; `name` is what messages call it."""

    content: bytes
    name: str

    def read(self) -> bytes:
        """The bytes."""
        return self.content

    def __str__(self) -> str:
        return self.name


def check_size(count: int) -> None:
    """Raises OSError for more bytes than a picture may have; before they are read into memory."""
    if count > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has {size(count)}, more than the {size(MOST_BYTES)} that a picture may have")


def load_source(source: Source) -> Loaded:
    """Read it. Raises OSError; ValueError for a name that no file can have."""
    if isinstance(source, Path):
        status = source.stat()
        check_size(status.st_size)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "it is no file")
    return Loaded(source.read_bytes() if isinstance(source, Path) else source.read(), str(source))

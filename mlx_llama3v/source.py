"""Where a picture's bytes come from: a file of its own, or a value that reads them out of something larger.

The values are in data/sources.py and data/hf.py; what opens pictures knows only this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias


class Held(Protocol):
    """A picture that is no file of its own. Small, frozen and picklable, so that worker processes can open it."""

    def read(self) -> bytes:
        """All bytes of the picture. Raises OSError."""

    def __str__(self) -> str:
        """What messages call it."""


Source: TypeAlias = Path | Held


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


def load_source(source: Source) -> Loaded:
    """Read it. Raises OSError; ValueError for a name that no file can have."""
    return Loaded(source.read_bytes() if isinstance(source, Path) else source.read(), str(source))

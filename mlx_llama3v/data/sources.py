"""Pictures that are no files of their own (see source.py), and the folders in which files are looked up."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlx_llama3v.source import Source, check_size

_HEAD = 1 << 16  # bytes that hold the header of nearly every picture


@dataclass(frozen=True)
class Refused:
    """A picture that must not or cannot be looked up; it takes part in a run as a failure with this reason."""

    name: str
    reason: str

    def read(self) -> bytes:
        """Raises OSError with the reason, always."""
        raise OSError(errno.EACCES, self.reason)

    def __str__(self) -> str:
        return repr(self.name)


@dataclass(frozen=True)
class FilePart:
    """A picture that is `size` bytes of a larger file, as in a tar shard."""

    path: Path
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """Raises OSError, also where the file became shorter."""
        check_size(self.size)
        return self._read(self.size)

    def head(self) -> bytes:
        """The first bytes alone. Raises OSError."""
        return self._read(min(self.size, _HEAD))

    def _read(self, count: int) -> bytes:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            content = file.read(count)
            while 0 < len(content) < count and (more := file.read(count - len(content))):
                content += more
        if len(content) < count:
            raise OSError(errno.EIO, f"{self.path} ends in the middle of it")
        return content

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"


class Folders:
    """The folders in which pictures are looked up by name, and which they may not leave.

    A name leaves them by "..", by being absolute, or by a symbolic link on the way to the file.
    """

    def __init__(self, folders: Iterable[Path], *, allow_outside: bool = False) -> None:
        self._folders = tuple(folders)
        self._allow = allow_outside
        self._roots = tuple(os.path.realpath(folder) for folder in self._folders)
        self._real_folders: dict[str, str] = {}

    def find(self, name: str) -> Source:
        """Where the picture is, looked up in every folder, with its name as it stands and without a leading "data/".

        A name that is nowhere keeps the first place that was tried, so that whoever opens it says so.
        """
        if "://" in name[:16]:
            return Refused(f"{name:.60}", "it is a web address, not a file: download it first")
        try:
            os.fsencode(name)
        except UnicodeEncodeError:  # half an emoji, which JSON can spell
            return Refused(name, "its name is not valid Unicode")
        spellings = dict.fromkeys((name, name.removeprefix("data/")))
        places = list(dict.fromkeys(folder / spelling for folder in self._folders for spelling in spellings))
        outside = None
        for place in places:
            if os.path.isfile(place):
                checked = self.check(name, place)
                if isinstance(checked, Path):
                    return checked
                outside = outside or checked
        return outside or self.check(name, places[0])

    def check(self, name: str, place: Path) -> Source:
        """`place`, or Refused where it is outside of all folders."""
        if self._allow or "\0" in name:  # no file has a NUL in its name: opening it says so
            return place
        real = self._real(place)
        if any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self._roots):
            return place
        searched = str(self._folders[0]) + (" and the folders above it" if len(self._folders) > 1 else "")
        leads = "" if os.path.normpath(place) == real else f" (it leads to {real})"
        return Refused(name, f"it lies outside {searched}{leads}: --allow-outside reads it all the same")

    def _real(self, place: Path) -> str:
        """realpath(); pictures of one folder share the work."""
        if os.path.islink(place) or not place.name or ".." in place.parts:
            return os.path.realpath(place)
        folder = str(place.parent)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return os.path.join(self._real_folders[folder], place.name)

"""What every data source is turned into: a conversation and the names of its pictures.

A row that cannot be used is a `Problem`, not an exception: it is counted, shown, and the rest goes on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec

from mlx_llama3v.text.prompt import Message

_TOGETHER = 4096  # records that are hashed at once: few calls, little memory


class Record(msgspec.Struct, frozen=True, gc=False):
    """One conversation. `Message.images` are indices into `images`, the names of its pictures."""

    id: str
    images: tuple[str, ...]
    messages: tuple[Message, ...]

    @property
    def caption(self) -> bool:
        """Whether it is pictures and one answer with nothing asked: the bare form of stage pretrain."""
        answers = 0
        for message in self.messages if self.images else ():
            if message.role == "assistant":
                answers += 1
            elif message.text and not message.text.isspace():
                return False
        return answers == 1


@dataclass(frozen=True)
class Problem:
    """Something that was left out: where it stands ("train.json: record 7", "photo.jpg") and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        said = f"{self.where}: {self.reason}"
        return said.encode("utf-8", "backslashreplace").decode()  # not every file name can be printed


@dataclass(frozen=True)
class RecordFile:
    """What one data file gave."""

    path: Path
    records: tuple[Record, ...]
    problems: tuple[Problem, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """Names of all pictures, each once, in the order of their first use."""
        return tuple(dict.fromkeys(name for record in self.records for name in record.images))


def records_digest(records: Sequence[Record]) -> str:
    """SHA-256 of all that the records say, in their order."""
    found = sha256()
    for start in range(0, len(records), _TOGETHER):
        some = list(records[start : start + _TOGETHER])
        try:
            found.update(msgspec.json.encode(some))
        except UnicodeEncodeError:  # a file name that is no UTF-8
            found.update(repr(some).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's cyclic garbage collector rests: among millions of new records it looks again and again, and finds none.

    Reading takes half the time so.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()

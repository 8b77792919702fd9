"""One shard: a safetensors file that describes itself, written atomically and read row by row.

Its tensors are the codec's parts [N, ...], one row a patch embedding; the codec's channel parts [1, D], which all
rows share; and the index (index.py): which pictures lie where, and which names stand for which content hash.

Reading takes header and index once and then only the bytes of the wanted picture. Plain positioned reads are used
rather than a memory map: they are twice as fast for a copy, any file may be closed at any time (a large store has more
shards than a process may have open files), and a file that was cut short under us is an error instead of a SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_llama3v.config import SliceLayout
from mlx_llama3v.durable import flush, sync
from mlx_llama3v.embeddings.codec import CHANNEL
from mlx_llama3v.embeddings.index import TENSORS, ShardIndex
from mlx_llama3v.errors import DamagedError, StoreError

SCHEMA = 2  # of manifest and shards alike
_DTYPES: dict[str, type] = {
    "F16": np.float16,
    "F32": np.float32,
    "I8": np.int8,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "U64": np.uint64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_F_RDADVISE = 44  # of macOS's fcntl.h
_MAX_HEADER = 100_000_000  # the safetensors format's own limit

Parts = Mapping[str, np.ndarray]
Picture = tuple[str, SliceLayout, Parts]  # content hash, slice shapes, the codec's parts [layout.patches, ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor [N, ...] of a shard: where its bytes are in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @cached_property  # asked for several times a picture that is read
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One shard, opened: all that is known of it without reading its rows."""

    path: Path
    codec: str
    fingerprint: str
    index: ShardIndex
    parts: dict[str, Tensor]  # of the codec, N rows each
    channels: dict[str, np.ndarray]  # of the codec, one row each
    bytes: int

    def read(self, i: int) -> dict[str, np.ndarray]:
        """The codec's parts of picture i, each [patches, ...]. Reads nothing else; safe in several threads.

        Raises StoreError naming the file where it is gone or was cut short.
        """
        return self.read_from(OpenFile(self.path), i, np.empty(self.size(i), np.uint8))

    def size(self, i: int) -> int:
        """Bytes that `read_from` needs for picture i: its parts, each at a multiple of 8."""
        return sum(_aligned(int(self.index.patches[i]) * part.row_bytes) for part in self.parts.values())

    def read_from(self, file: OpenFile, i: int, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """As `read`, from this shard's file, into `buffer` (uint8 [size(i)]), of which the parts are views."""
        start, rows = int(self.index.starts[i]), int(self.index.patches[i])
        found, at = {}, 0
        for name, part in self.parts.items():
            count = rows * part.row_bytes
            self._fill(file.descriptor, part.offset + start * part.row_bytes, buffer[at : at + count])
            found[name] = buffer[at : at + count].view(part.dtype).reshape(rows, *part.shape[1:])
            at += _aligned(count)
        return found

    def advise(self, file: OpenFile, i: int) -> None:
        """Tell the system that picture i is read next: its disk then works on many pictures at once."""
        start, rows = int(self.index.starts[i]), int(self.index.patches[i])
        for part in self.parts.values():
            _advise(file.descriptor, part.offset + start * part.row_bytes, rows * part.row_bytes)

    def _fill(self, descriptor: int, offset: int, target: np.ndarray) -> None:
        left = _view(target)
        while left:
            try:
                count = os.preadv(descriptor, [left], offset)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if not count:
                raise damaged(self.path, f"it ends {len(left)} bytes into a picture")
            left, offset = left[count:], offset + count


class OpenFile:
    """A file that is open as long as somebody holds this. Raises StoreError naming it."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(path, error) from error

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone first, when Python ends
        if hasattr(self, "descriptor"):
            close(self.descriptor)


def _unreadable(path: Path, error: OSError) -> StoreError:
    """For a file that the system does not give."""
    return StoreError(f"{path} cannot be read: {error.strerror or error}.")


def _aligned(count: int) -> int:
    return -(-count // 8) * 8


def _advise(descriptor: int, offset: int, count: int) -> None:
    with suppress(OSError):  # only a hint; some file systems know none
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_WILLNEED)
        elif sys.platform == "darwin":  # struct radvisory {off_t, int}
            fcntl.fcntl(descriptor, _F_RDADVISE, struct.pack("qi4x", offset, min(count, 1 << 30)))


def write_shard(
    path: Path,
    *,
    codec: str,
    fingerprint: str,
    pictures: Sequence[Picture],
    names: Mapping[str, str],
    channels: Parts | None = None,
) -> None:
    """Write pictures and names (name -> content hash) as one shard. Atomic.

    Raises StoreError when the disk refuses it; then nothing of the shard is left behind.
    """
    index = ShardIndex.make([(sha, layout) for sha, layout, _ in pictures], names)
    columns: dict[str, list[np.ndarray]] = {key: [value] for key, value in index.tensors.items()}
    if pictures:
        columns |= {key: [value] for key, value in (channels or {}).items()}
        columns |= {key: [parts[key] for _, _, parts in pictures] for key in pictures[0][2]}
    # The index first, since it is read with the header; then wide items: every tensor starts at a multiple of them.
    columns = dict(sorted(columns.items(), key=lambda item: (item[0] not in TENSORS, -item[1][0].itemsize)))
    header: dict[str, Any] = {}
    arrays: list[np.ndarray] = []
    offset = 0
    for key, column in columns.items():
        column = [np.ascontiguousarray(array) for array in column]
        size = sum(array.nbytes for array in column)
        header[key] = {
            "dtype": _NAMES[column[0].dtype],
            "shape": [sum(map(len, column)), *column[0].shape[1:]],
            "data_offsets": [offset, offset + size],
        }
        arrays += column
        offset += size
    header["__metadata__"] = {
        "format": "mlx-llama3v embeddings",
        "schema": str(SCHEMA),
        "codec": codec,
        "fingerprint": fingerprint,
    }
    header["__metadata__"]["crc32"] = _checksum(header, arrays)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(path, [struct.pack("<Q", len(text)), text, *arrays])


def read_shard(path: Path, *, whole: bool = True) -> Shard:
    """Read and check one shard's header and index. Raises StoreError naming the file when it is cut or damaged.

    `whole`: False takes one, too, that was cut behind its index.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise damaged(path, f"{size} bytes do not hold its header")
            text = file.read(length)
            try:
                metadata, tensors = _parse(text, 8 + length)
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
                raise damaged(path, "its header is not readable") from error
            if metadata["schema"] != str(SCHEMA):
                raise StoreError(f"{path} has schema version {metadata['schema']}; this version reads {SCHEMA}.")
            expected = max([8 + length, *(t.offset + t.shape[0] * t.row_bytes for t in tensors.values())])
            if whole and size != expected:
                raise damaged(path, f"it has {size} bytes, its header says {expected}")
            own = {name: tensors.pop(name) for name in [*tensors] if name in TENSORS or name.startswith(CHANNEL)}
            values = {name: _load(file, tensor) for name, tensor in own.items()}
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise damaged(path, "it ends within its index") from error
    channels = {name: values.pop(name) for name in [*values] if name not in TENSORS}
    try:
        wrong = [key for key, (dtype, row) in TENSORS.items() if _differs(values[key], dtype, row)]
        if wrong or any(len(value) != 1 for value in channels.values()):
            raise ValueError(wrong)
        index = ShardIndex(values)
        index.check()
    except (ValueError, KeyError) as error:
        raise damaged(path, "its index is not readable") from error
    rows = int(index.starts[-1])
    if any(part.shape[0] != rows for part in tensors.values()) or (rows and not tensors):
        raise damaged(path, f"its pictures need {rows} rows, its tensors have another number")
    return Shard(path, metadata["codec"], metadata["fingerprint"], index, tensors, channels, size)


def _parse(text: bytes, first: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a header; `first` is the file's first data byte."""
    header = json.loads(text)
    metadata = header.pop("__metadata__")
    if any(not isinstance(metadata[key], str) for key in ("schema", "codec", "fingerprint")):
        raise TypeError("metadata")
    tensors = {}
    for name, values in header.items():
        start, end = values["data_offsets"]
        shape = values["shape"]
        if not shape or any(type(n) is not int or not 0 <= n < 1 << 40 for n in (*shape, start, end)):
            raise ValueError(name)
        tensor = Tensor(np.dtype(_DTYPES[values["dtype"]]), tuple(shape), first + start)
        if end - start != tensor.shape[0] * tensor.row_bytes:
            raise ValueError(name)
        tensors[name] = tensor
    return metadata, tensors


def _load(file: Any, tensor: Tensor) -> np.ndarray:
    file.seek(tensor.offset)
    count = tensor.shape[0] * tensor.row_bytes
    return np.frombuffer(file.read(count), tensor.dtype).reshape(tensor.shape)


def _differs(value: np.ndarray, dtype: type, row: tuple[int, ...]) -> bool:
    return value.dtype != dtype or value.shape[1:] != row


def verify_shard(path: Path) -> None:
    """Read a whole shard and compare its checksum. Raises StoreError naming the file when they differ."""
    read_shard(path)
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            expected = header["__metadata__"].pop("crc32", "missing")
            found = _checksum(header, iter(lambda: file.read(1 << 24), b""))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}.") from error
    if found != expected:
        raise damaged(path, f"its checksum is {found}, expected {expected}")


def write_atomic(path: Path, chunks: Iterable[bytes | np.ndarray]) -> None:
    """Write a file so that it is complete or absent, whatever happens and whenever.

    Temporary name, fsync, rename, fsync of the directory. Raises StoreError when the disk refuses (full,
    read-only); the old file, if there was one, is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(_view(chunk))
            file.flush()
            flush(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):  # where the directory is read-only now, it stays until a writer can clean up
            temporary.unlink()
        first = "make room and " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StoreError(
            f"{path} cannot be written ({error.strerror or error}); everything stored before it is safe: "
            f"{first}run the same command again."
        ) from error


def _checksum(header: dict[str, Any], blocks: Iterable[bytes | np.ndarray]) -> str:
    """CRC-32 of the header, which has no checksum yet, and the data."""
    value = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for block in blocks:
        value = zlib.crc32(_view(block), value)
    return f"{value:08x}"


def _view(block: Any) -> memoryview:
    """The bytes of an array or of bytes, without a copy (NumPy's empty arrays cannot be cast)."""
    return memoryview(block).cast("B") if len(block) else memoryview(b"")


def damaged(path: Path, why: str) -> DamagedError:
    """The error about a shard whose bytes are not what was written."""
    return DamagedError(f"{path} is damaged: {why}")


def clear_leftovers(store: Path) -> None:
    """Delete what a killed writer had begun (`write_atomic`). For who holds the store's lock: none is alive."""
    for leftover in store.glob(".*.tmp"):
        with suppress(OSError):  # where that is refused, writing will be, too
            leftover.unlink()

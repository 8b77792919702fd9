"""One shard: a safetensors file that describes itself, written atomically and read row by row.

The metadata hold an index (JSON): which pictures lie where in the concatenated tensors, and which names stand
for which content hash. The names may refer to a picture of another shard: that is how a duplicate found in a
later run is stored for the price of its name.

Reading takes the header once and then only the bytes of the wanted picture. Plain positioned reads are used
rather than a memory map: they are twice as fast for a copy, hold no file open (a large store has more shards
than a process may have open files), and a file that was cut short under us is an error instead of a SIGBUS.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_llama3v.config import SliceLayout
from mlx_llama3v.errors import StoreError

SCHEMA = 1  # of manifest and shards alike
_DTYPES = {"F16": np.float16, "F32": np.float32, "I8": np.int8, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the safetensors format's own limit


@dataclass(frozen=True)
class Entry:
    """One stored picture: content hash, slice shapes, and its first row in the shard's tensors."""

    sha: str
    layout: SliceLayout
    start: int

    def to_json(self) -> list[Any]:
        """[hash, start, six layout integers]"""
        at = self.layout
        return [self.sha, self.start, *at.overview, at.rows, at.cols, *at.tile]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Entry:
        """The inverse of `to_json`."""
        sha, start, height, width, rows, cols, tile_height, tile_width = values
        return cls(sha, SliceLayout((height, width), rows, cols, (tile_height, tile_width)), start)


@dataclass(frozen=True)
class Part:
    """One tensor [N, ...] of a shard: where its bytes are in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """The header of one shard: all that is known of it without reading its data."""

    path: Path
    codec: str
    fingerprint: str
    entries: tuple[Entry, ...]
    names: dict[str, str]  # name -> content hash, possibly of a picture in another shard
    parts: dict[str, Part]
    bytes: int

    def read(self, entry: Entry) -> dict[str, np.ndarray]:
        """The codec's parts of one picture, each [entry.layout.patches, ...]. Reads nothing else."""
        rows = entry.layout.patches
        found = {}
        for name, part in self.parts.items():
            count, offset = rows * part.row_bytes, part.offset + entry.start * part.row_bytes
            try:
                data = np.fromfile(self.path, np.uint8, count, offset=offset)
            except OSError as error:
                raise StoreError(f"{self.path} cannot be read: {error.strerror or error}.") from error
            if data.size != count:
                raise _damaged(self.path, f"it ends {count - data.size} bytes into a picture")
            found[name] = data.view(part.dtype).reshape(rows, *part.shape[1:])
        return found


def write_shard(
    path: Path,
    *,
    codec: str,
    fingerprint: str,
    pictures: Sequence[tuple[str, SliceLayout, dict[str, np.ndarray]]],
    names: dict[str, str],
) -> None:
    """Write (content hash, layout, codec parts) of all pictures and the names as one shard. Atomic.

    Raises StoreError when the disk refuses it; then nothing of the shard is left behind.
    """
    entries, start = [], 0
    for sha, layout, _ in pictures:
        entries.append(Entry(sha, layout, start).to_json())
        start += layout.patches
    index = json.dumps({"images": entries, "names": list(names.items())}, separators=(",", ":"))
    header: dict[str, Any] = {}
    arrays: list[np.ndarray] = []
    offset = 0
    for key in pictures[0][2] if pictures else ():
        column = [np.ascontiguousarray(parts[key]) for _, _, parts in pictures]
        size = sum(array.nbytes for array in column)
        shape = [start, *column[0].shape[1:]]
        header[key] = {
            "dtype": _NAMES[column[0].dtype],
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        arrays += column
        offset += size
    header["__metadata__"] = {
        "format": "mlx-llama3v embeddings",
        "schema": str(SCHEMA),
        "codec": codec,
        "fingerprint": fingerprint,
        "index": index,
    }
    header["__metadata__"]["crc32"] = _checksum(header, arrays)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(path, [struct.pack("<Q", len(text)), text, *arrays])


def read_header(path: Path) -> Shard:
    """Read and check one shard's header. Raises StoreError naming the file when it is cut or damaged."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise _damaged(path, f"{size} bytes do not hold its header")
            text = file.read(length)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        schema, index = metadata["schema"], json.loads(metadata["index"])
        parts, ends = {}, [0]
        for name, values in header.items():
            first, last = values["data_offsets"]
            part = Part(np.dtype(_DTYPES[values["dtype"]]), tuple(values["shape"]), 8 + length + first)
            if last - first != part.shape[0] * part.row_bytes:
                raise ValueError(f"the shape of {name}")
            parts[name] = part
            ends.append(last)
        entries = tuple(Entry.from_json(values) for values in index["images"])
        names = {str(name): str(sha) for name, sha in index["names"]}
        shard = Shard(path, metadata["codec"], metadata["fingerprint"], entries, names, parts, size)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise _damaged(path, "its header is not readable") from error
    if schema != str(SCHEMA):
        raise StoreError(f"{path} has schema version {schema}; this version reads {SCHEMA}.")
    if size != 8 + length + max(ends):
        raise _damaged(path, f"it has {size} bytes, its header says {8 + length + max(ends)}")
    rows = entries[-1].start + entries[-1].layout.patches if entries else 0
    if any(part.shape[0] != rows for part in parts.values()) or (rows and not parts):
        raise _damaged(path, f"its pictures need {rows} rows, its tensors have another number")
    return shard


def verify_shard(path: Path) -> None:
    """Read a whole shard and compare its checksum. Raises StoreError naming the file when they differ."""
    read_header(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        expected = header["__metadata__"].pop("crc32", "missing")
        found = _checksum(header, iter(lambda: file.read(1 << 24), b""))
    if found != expected:
        raise _damaged(path, f"its checksum is {found}, expected {expected}")


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
            _sync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(
            f"{path} cannot be written ({error.strerror or error}); everything stored before it is safe, "
            "so make room and run the same command again."
        ) from error


def _sync(descriptor: int) -> None:
    """fsync; on macOS that alone leaves the data in the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # network volumes do not know it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    """Make a rename durable, where the file system can (the rename itself is atomic everywhere)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(header: dict[str, Any], blocks: Iterable[bytes | np.ndarray]) -> str:
    """CRC-32 of the header, which has no checksum yet, and the data."""
    value = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for block in blocks:
        value = zlib.crc32(_view(block), value)
    return f"{value:08x}"


def _view(block: Any) -> memoryview:
    """The bytes of an array or of bytes, without a copy (NumPy's empty arrays cannot be cast)."""
    return memoryview(block).cast("B") if len(block) else memoryview(b"")


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}; delete the file and run `embed` again to make it anew.")

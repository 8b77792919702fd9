"""Reads Hugging Face data sets: parquet files and `save_to_disk` folders (Arrow) with `image` or `images` columns.

Through pyarrow (the `datasets` extra brings it). Pictures are structs {"bytes", "path"}, plain bytes, or names of
files. A picture that lies in a table is called file#row.index: that needs no look at its bytes, and `embed` and
`train` agree on it. Its bytes are read when it is encoded; here only the words and names are.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_llama3v.data.llava import caption_row, read_row
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.errors import DataError
from mlx_llama3v.source import Source

_SPLITS, _STATE = "dataset_dict.json", "state.json"  # what save_to_disk leaves beside the tables
_TALK = ("messages", "conversations", "caption", "text", "id", "system_prompt")
_IMAGES = ("images", "image")
_BATCH = 16  # rows with pictures that are in memory at a time
_open = threading.local()


@dataclass(frozen=True)
class TableCell:
    """A picture inside a table: picture `index` of a row of the file."""

    path: Path
    column: str
    row: int
    index: int

    def read(self) -> bytes:
        """Rows that are asked for in rising order are read once, by each thread. Raises OSError.

        A thread then holds a page of its row group, uncompressed: writers that look at a page's size only every
        1,024 rows, as pyarrow does, make that the whole group. Arrow files are mapped and cost no memory.
        """
        reader = getattr(_open, "reader", None)
        if reader is None or (reader.path, reader.column) != (self.path, self.column):
            reader = _open.reader = _Reader(self.path, self.column)
        try:
            content = _pictures(reader.value(self.row))[self.index]
        except (OSError, ValueError, LookupError) as error:
            _open.reader = None
            raise OSError(errno.EIO, " ".join(str(error).split()) or "no such picture") from error
        if not isinstance(content, bytes):
            raise OSError(errno.ENOENT, "it has no bytes")
        return content

    def __str__(self) -> str:
        return f"{self.path} row {self.row} picture {self.index}"


@dataclass
class Table:
    """What one file gave."""

    records: list[Record] = field(default_factory=list)
    pictures: dict[str, Source] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_table(path: Path, name: str) -> Table:
    """Read one parquet or Arrow file; its pictures are called `name`#row.index.

    Raises DataError where it is no such file or has neither pictures nor conversations.
    """
    found = Table()
    with _reading(path):
        opened = _opened(path)
        schema = opened.schema if path.suffix == ".arrow" else opened.schema_arrow
        columns = schema.names
        pictures = next((column for column in _IMAGES if column in columns), None)
        talk = [column for column in _TALK if column in columns]
        if pictures is None and not {"messages", "conversations"} & set(talk):
            raise DataError(f"{path} has the columns {', '.join(columns):.80}; expected 'images' and 'messages'.")
        if pictures is not None and not _holds_pictures(kind := schema.field(pictures).type):
            raise DataError(
                f"{path} has {kind!s:.80} in its column {pictures!r}; expected bytes, names of files, structs with "
                "'bytes' or 'path', or lists of these."
            )
        names: Iterator[list[Any]] = iter(()) if pictures is None else _row_pictures(path, opened, pictures)
        for row, values in enumerate(_rows(opened, talk)):
            listed = []
            for index, at in enumerate(next(names) if pictures is not None else []):
                if isinstance(at, str):
                    listed.append(at)
                    continue
                listed.append(f"{name}#{row}.{index}")
                found.pictures[listed[-1]] = TableCell(path, str(pictures), row, index)
            _take(values, listed, row, name, found)
    return found


def _take(values: dict[str, Any], pictures: list[str], row: int, name: str, found: Table) -> None:
    """One row: its conversation, or its caption, or nothing but pictures."""
    where = f"{name}: row {row}"
    given = {key: value for key, value in values.items() if value is not None}
    caption = given.get("caption", given.get("text"))
    if "messages" in given or "conversations" in given:
        read = read_row(given | {"images": pictures}, f"{name}#{row}", where)
    elif isinstance(caption, str) and pictures:
        read = read_row(caption_row(pictures, caption), given.get("id", f"{name}#{row}"), where)
    elif pictures:
        return
    else:
        read = Problem(where, "it has neither a conversation nor a picture")
    if isinstance(read, Record):
        found.records.append(read)
    else:
        found.problems.append(read)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / _SPLITS).is_file() or (folder / _STATE).is_file()


def arrow_files(folder: Path) -> list[Path]:
    """The tables of a `save_to_disk` folder, in their order. Raises DataError, also for one with several splits."""
    try:
        if (folder / _SPLITS).is_file():
            splits = json.loads((folder / _SPLITS).read_bytes())["splits"]
            choices = ", ".join(str(folder / str(split)) for split in splits)
            raise DataError(f"{folder} holds several splits; give one of them: {choices}.")
        listed = json.loads((folder / _STATE).read_bytes())["_data_files"]
        return [folder / Path(entry["filename"]).name for entry in listed]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder} is not a whole `save_to_disk` folder: {error}.") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong with a file becomes a DataError; pyarrow's own errors are ValueErrors, OSErrors, KeyErrors."""
    try:
        yield
    except ImportError:
        raise DataError(f"{path} needs pyarrow: pip install 'mlx-llama3v[datasets]'.") from None
    except (OSError, ValueError, LookupError, NotImplementedError) as error:
        raise DataError(f"{path} cannot be read as a table: {' '.join(str(error).split())}.") from error


def _opened(path: Path) -> Any:
    """A ParquetFile, or the whole Arrow table, mapped into memory and not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".arrow":
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    return pq.ParquetFile(path, memory_map=True, pre_buffer=False)


def _holds_pictures(kind: Any) -> bool:
    """Whether `_pictures` knows cells of that pyarrow type."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return bool({"bytes", "path"} & {field.name for field in kind})
    if types.is_dictionary(kind):
        kind = kind.value_type
    return not types.is_nested(kind) and any(word in str(kind) for word in ("binary", "string", "null"))


def _rows(opened: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The wanted columns of every row."""
    if not hasattr(opened, "iter_batches"):
        table = opened.select(columns)
        count = opened.num_rows
        batches: Any = table.to_batches(max_chunksize=1024) if columns else ()
    else:
        count = opened.metadata.num_rows
        batches = opened.iter_batches(1024, columns=columns) if columns else ()
    if not columns:
        yield from ({} for _ in range(count))
    for batch in batches:
        yield from batch.to_pylist()


def _row_pictures(path: Path, opened: Any, column: str) -> Iterator[list[Any]]:
    """For every row, a file name for each picture that is one, and None for each that has bytes here."""
    if not hasattr(opened, "iter_batches"):
        for batch in opened.select([column]).to_batches(max_chunksize=_BATCH):
            yield from map(_names, batch.column(0))
        return
    for group in range(opened.num_row_groups):
        meta = opened.metadata.row_group(group)
        leaves = {meta.column(i).path_in_schema: meta.column(i) for i in range(meta.num_columns)}
        own = {leaf: part for leaf, part in leaves.items() if leaf.split(".")[0] == column}
        bytes_leaf = next((part for leaf, part in own.items() if leaf.endswith(".bytes")), None)
        path_leaf = next((leaf for leaf in own if leaf.endswith(".path")), None)
        if bytes_leaf is not None and path_leaf is not None:
            rows = [
                [part.get("path") for part in _listed(row[column])]
                for batch in opened.iter_batches(1024, row_groups=[group], columns=[path_leaf])
                for row in batch.to_pylist()
            ]
            stats = bytes_leaf.statistics
            count = bytes_leaf.num_values - stats.null_count if stats is not None and stats.has_null_count else -1
            if count == sum(map(len, rows)):  # all have bytes: their paths say nothing
                yield from ([None] * len(row) for row in rows)
                continue
        for batch in opened.iter_batches(_BATCH, row_groups=[group], columns=[column], use_threads=False):
            yield from map(_names, batch.column(0))


def _listed(value: Any) -> list[Any]:
    return [item for item in value if item is not None] if isinstance(value, list) else [] if value is None else [value]


def _pictures(value: Any) -> list[Any]:
    """Bytes or file name (or None) of each picture in one cell."""
    return [
        (item["bytes"] if item.get("bytes") is not None else item.get("path")) if isinstance(item, dict) else item
        for item in _listed(value.as_py())
    ]


def _names(value: Any) -> list[str | None]:
    return [item if isinstance(item, str) else None for item in _pictures(value)]


class _Reader:
    """The pictures of one file from the row that was asked for last: reading on costs nothing twice."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        with _reading_now():
            self._opened = _opened(path)
        self._table = None if hasattr(self._opened, "iter_batches") else self._opened.column(column)
        self._group, self._start = -1, 0
        self._batch: Any = None
        self._batches: Iterator[Any] = iter(())

    def value(self, row: int) -> Any:
        """The cell of one row, a pyarrow scalar."""
        if self._table is not None:
            return self._table[row]
        group, first = self._find(row)
        if group != self._group or row < self._start:
            self._batches = self._opened.iter_batches(
                _BATCH, row_groups=[group], columns=[self.column], use_threads=False
            )
            self._group, self._start, self._batch = group, first, next(self._batches)
        while row >= self._start + len(self._batch):
            self._start += len(self._batch)
            self._batch = next(self._batches)
        return self._batch.column(0)[row - self._start]

    def _find(self, row: int) -> tuple[int, int]:
        """The row group of a row, and its first row."""
        first = 0
        for group in range(self._opened.num_row_groups):
            count = self._opened.metadata.row_group(group).num_rows
            if row < first + count:
                return group, first
            first += count
        raise IndexError(f"it has {first} rows")


@contextmanager
def _reading_now() -> Iterator[None]:
    try:
        yield
    except (ImportError, ValueError) as error:
        raise OSError(errno.EIO, " ".join(str(error).split())) from error

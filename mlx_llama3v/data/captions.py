"""What a folder says of its pictures, in the ways that people keep captions beside them.

| file | of which picture |
|---|---|
| `photo.txt` (or .caption, .cap, .json) | `photo.jpg` beside it (img2dataset, kohya) |
| `metadata.jsonl`, `metadata.csv` | those whose names from its folder on its rows give as `file_name` (Hugging Face) |

Words are a caption (`text` or `caption` in a table), or a conversation as llava.py reads it. Of a picture that is in a
table nothing else is looked for.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_llama3v.data.beside import MOST_TEXT, TEXTS, Unfit, row_beside, row_of
from mlx_llama3v.data.llava import read_row
from mlx_llama3v.data.records import Problem, Record, collector_paused

_TABLES = ("metadata.jsonl", "metadata.csv")
_KINDS = {**dict.fromkeys(TEXTS, "txt"), ".json": "json"}  # by ending; the first of a kind is used


def folder_records(
    folder: Path, pictures: Mapping[str, Path], *, allow_outside: bool = False
) -> tuple[list[Record], list[Problem]]:
    """Records of the pictures of a folder (folder.folder_images), in the order of their names; and what is unfit.

    Links to words elsewhere are followed with `allow_outside` alone.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    with collector_paused():
        root = None if allow_outside else os.path.realpath(folder)
        for name, where, row in sorted(_found(folder, pictures, root, problems), key=lambda found: found[0]):
            read = read_row(row, name, where)
            if isinstance(read, Record):
                records.append(read)
            else:
                problems.append(read)
    return records, problems


def _found(
    folder: Path, pictures: Mapping[str, Path], root: str | None, problems: list[Problem]
) -> Iterator[tuple[str, str, Any]]:
    """(first picture, where its words stand, row of llava.py)."""
    told = set[str]()
    places = {PurePosixPath(parent) for parent in {name.rpartition("/")[0] for name in pictures}}
    for place in sorted(places.union(*(place.parents for place in places))):
        for where, values in _tables(folder, place, root, problems):
            try:
                names = _named(values, place, pictures)
                told.update(names)
                if row := row_of(names, values, values.get("text")):
                    yield names[0], where, row
            except Unfit as error:
                problems.append(Problem(where, str(error)))
    texts: dict[Path, set[str]] = {}
    for name, file in pictures.items():
        if name in told:
            continue
        if (parent := file.parent) not in texts:
            texts[parent] = {name for name in os.listdir(parent) if name.endswith((*_KINDS,))}
        try:
            words = _words(file, texts[parent], root) if texts[parent] else {}
            if words and (row := row_beside([name], words)):
                yield name, name, row
        except Unfit as error:
            problems.append(Problem(name, str(error)))


def _words(picture: Path, beside: set[str], root: str | None) -> dict[str, bytes]:
    """Contents of the files that are named as the picture, by kind. Raises Unfit."""
    found: dict[str, bytes] = {}
    folder, base = os.path.split(picture)
    stem = os.path.splitext(base)[0]
    for ending, kind in _KINDS.items():
        if kind not in found and stem + ending in beside:
            name, file = stem + ending, os.path.join(folder, stem + ending)
            if _leaves(file, root):
                raise Unfit(f"{name} is a link to a file outside: --allow-outside follows it")
            try:
                with open(file, "rb") as opened:
                    found[kind] = opened.read(MOST_TEXT + 1)
            except OSError as error:
                raise Unfit(f"{name} cannot be read: {error.strerror or error}") from error
            if len(found[kind]) > MOST_TEXT:
                raise Unfit(f"{name} has more than {MOST_TEXT} bytes of text")
    return found


def _leaves(file: str | Path, root: str | None) -> bool:
    """Whether a file is a link that leads out of a folder; never where that is None."""
    inside = root is None or not os.path.islink(file)
    return not inside and not os.path.realpath(file).startswith(str(root).rstrip(os.sep) + os.sep)


def _tables(
    folder: Path, place: PurePosixPath, root: str | None, problems: list[Problem]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of the tables in one folder."""
    for table in _TABLES:
        file, name = folder / place / table, str(place / table)
        if not file.is_file():
            continue
        if _leaves(file, root):
            problems.append(Problem(name, "it is a link to a file outside: --allow-outside follows it"))
            continue
        try:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                for number, values in _rows(lines, table):
                    if isinstance(values, dict):
                        yield f"{name}: line {number}", values
                    else:
                        problems.append(Problem(f"{name}: line {number}", values))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            problems.append(Problem(name, f"it cannot be read to its end: {error}"))


def _rows(lines: Iterable[str], table: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows, or why one is none, with their lines."""
    if table.endswith(".csv"):
        reader = csv.DictReader(lines)
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key and value is not None}
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                read = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, f"not JSON ({error})"
            else:
                yield number, read if isinstance(read, dict) else f"it is {line.strip():.40}; expected an object"


def _named(values: Mapping[str, Any], place: PurePosixPath, pictures: Mapping[str, Path]) -> list[str]:
    """Pictures of a row, by name. Raises Unfit."""
    given = values.get("file_names", values.get("file_name"))
    names = given if isinstance(given, list) else [given]
    found = [os.path.normpath(place / name).replace(os.sep, "/") if isinstance(name, str) else "" for name in names]
    if not found or not all(found):
        raise Unfit("it names no picture; expected file_name")
    if missing := next((name for name in found if name not in pictures), None):
        raise Unfit(f"its picture {missing!r} is not there")
    return found

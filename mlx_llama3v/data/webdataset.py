"""Reads WebDataset-style tar shards: files of one key (`0001.jpg`, `0001.txt`, `0001.json`) are one sample.

A shard is walked from header to header; of its content only captions and conversations are read. Pictures stay
where they are, as a stretch of the shard. A shard that was cut short gives what is whole. A text without a picture is a
Problem, since its picture may be lost, unless it is named as what describes a whole data set (README.txt, LICENSE.txt).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_llama3v.data.beside import MOST_TEXT, TEXTS, Unfit, row_beside
from mlx_llama3v.data.folder import PICTURES, unreadable
from mlx_llama3v.data.llava import read_row
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.data.sources import FilePart
from mlx_llama3v.errors import DataError
from mlx_llama3v.source import Source

_ABOUT = ("authors", "changelog", "citation", "copying", "copyright", "licence", "license", "notice", "readme")
_Member = tuple[str, tuple[int, int], bytes | None]  # name, offset and size in the shard, content where it is text


@dataclass
class _Sample:
    """The members of one key, in the order of the shard."""

    key: str
    pictures: dict[str, FilePart] = field(default_factory=dict)  # by name in the data set
    texts: dict[str, bytes] = field(default_factory=dict)  # "json" and "txt"
    endings: dict[str, str] = field(default_factory=dict)  # of these


@dataclass
class Shard:
    """What one tar shard gave."""

    records: list[Record] = field(default_factory=list)
    pictures: dict[str, Source] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_shard(path: Path, name: str) -> Shard:
    """Read one shard; its pictures are called `name`/member. Raises DataError where nothing of it is a tar file."""
    shard = Shard()
    for sample in _samples(path, name, shard):
        shard.pictures.update(sample.pictures)
        row = _row(sample, f"{name}: {sample.key}", shard.problems)
        if row is not None:
            record = read_row(row, sample.key, f"{name}: {sample.key}")
            if isinstance(record, Record):
                shard.records.append(record)
            else:
                shard.problems.append(record)
    return shard


def _samples(path: Path, name: str, before: Shard) -> Iterator[_Sample]:
    """Members of one key that follow each other. Of pictures of one name the first is used, wherever they stand."""
    problems = before.problems
    for _, group in groupby(_members(path, name, problems), lambda found: _first_key(found[0])):
        members = list(group)
        key = _stem if _points_in_names(members) else _first_key
        samples: dict[str, _Sample] = {}
        again = set()
        for member, place, content in members:
            sample = samples.setdefault(key(member), _Sample(key(member)))
            ending = _ending(member)
            kind = "json" if ending == ".json" else "txt"
            if f"{name}/{member}" in sample.pictures or f"{name}/{member}" in before.pictures:
                problems.append(Problem(f"{name}: {member}", "a picture of that name stands before it, which is used"))
                again.add(sample.key)
            elif content is None:
                sample.pictures[f"{name}/{member}"] = FilePart(path, *place, member)
            elif sample.endings.get(kind) == ending:
                problems.append(Problem(f"{name}: {member}", f"its sample has a {ending} before it, which is used"))
            else:
                sample.texts[kind], sample.endings[kind] = content, ending
        yield from (sample for sample in samples.values() if sample.pictures or sample.key not in again)


def _points_in_names(members: Sequence[_Member]) -> bool:
    """Whether keys end at the last point: "at 10.15.23.txt" is the text of "at 10.15.23.png" alone, not of all "at 10".

    Told by a text that is named as one of the pictures, and not as the key.
    """
    if all(member.rpartition("/")[2].count(".") < 2 for member, _, _ in members):
        return False
    pictures = {_stem(member) for member, _, content in members if content is None}
    texts = {_stem(member) for member, _, content in members if content is not None}
    return any(stem != _first_key(stem) for stem in pictures & texts)


def _first_key(member: str) -> str:
    """'train/0001.left.jpg' -> 'train/0001': the key ends at the file name's first point."""
    path = PurePosixPath(member)
    return str(path.with_name(path.name.split(".")[0] or path.name))


def _stem(member: str) -> str:
    """'train/0001.left.jpg' -> 'train/0001.left'."""
    return str(PurePosixPath(member).with_suffix(""))


def _ending(member: str) -> str:
    return PurePosixPath(member).suffix.lower()


def _members(path: Path, name: str, problems: list[Problem]) -> Iterator[_Member]:
    """The members of use."""
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            length = path.stat().st_size
            try:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it keeps every header: a shard may have a million
                    if not _wanted(member):
                        if why := unreadable(member.name):
                            problems.append(Problem(f"{name}: {member.name}", why))
                        continue
                    if why := _refusal(member, length):
                        problems.append(Problem(f"{name}: {member.name}", why))
                    elif _ending(member.name) in PICTURES:
                        yield member.name, (member.offset_data, member.size), None
                    else:
                        file.seek(member.offset_data)
                        yield member.name, (member.offset_data, member.size), file.read(member.size)
            except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
                problems.append(Problem(name, f"damaged at byte {tar.offset} ({error}); what stands before is used"))
                return
            file.seek(tar.offset)
            rest = file.read(512)
            if len(rest) < 512 and not rest.strip(b"\0"):
                problems.append(Problem(name, "it has no end mark, so it may be cut short; what is there is used"))
            elif rest.strip(b"\0"):
                problems.append(Problem(name, f"damaged at byte {tar.offset}; what stands before is used"))
    except (tarfile.TarError, OSError, ValueError) as error:
        with_gzip = path.suffix in (".gz", ".tgz", ".zst", ".bz2", ".xz")
        what = "is compressed; unpack it first" if with_gzip else f"cannot be read as a tar file: {error}"
        raise DataError(f"{path} {what}.") from error


def _wanted(member: tarfile.TarInfo) -> bool:
    """Whether it is named as a picture or a text; what a Mac adds ("._0001.jpg") is not."""
    ending = _ending(member.name)
    hidden = PurePosixPath(member.name).name.startswith(".")
    return not member.isdir() and not hidden and ending in (*PICTURES, *TEXTS, ".json")


def _refusal(member: tarfile.TarInfo, length: int) -> str:
    """Why a member is not used; empty where it is."""
    if not member.isfile():
        return "it is a link or a device; expected a file"
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return "its name leads out of the shard"
    if member.offset_data + member.size > length:
        return "the shard ends in the middle of it"
    if member.issparse():
        return "it is a sparse file; expected a plain one"
    if _ending(member.name) not in PICTURES and member.size > MOST_TEXT:
        return f"it has {member.size} bytes of text, more than {MOST_TEXT}"
    return ""


def _row(sample: _Sample, where: str, problems: list[Problem]) -> Any:
    """The sample as a row of llava.py, its pictures named as the data set has them; None where it has no words."""
    pictures = [*sample.pictures]
    if not pictures and [*sample.texts] == ["txt"] and PurePosixPath(sample.key).name.lower() in _ABOUT:
        return None
    try:
        return row_beside(pictures, sample.texts)
    except Unfit as error:
        problems.append(Problem(where, str(error)))
        return None

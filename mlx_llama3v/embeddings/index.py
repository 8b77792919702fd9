"""What a store holds, as arrays: a million pictures are a hundred megabytes, and opened without a loop over them.

A shard brings its part as tensors of its own file (`ShardIndex`); `Index` joins those of all shards and finds a
picture by name or content hash by bisection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np

from mlx_llama3v.config import SliceLayout

_MOST = 1 << 15  # of any number of a layout: their product then fits 64 bits
# name of the tensor -> dtype, row shape; what a shard's index consists of
TENSORS: dict[str, tuple[type, tuple[int, ...]]] = {
    "index.sha": (np.uint8, (32,)),  # of every picture, in the order of its rows
    "index.layouts": (np.int32, (6,)),  # overview, rows, columns, tile
    "index.names": (np.uint8, ()),  # UTF-8, one after the other
    "index.name_ends": (np.int64, ()),
    "index.name_keys": (np.uint64, ()),
    "index.name_sha": (np.uint8, (32,)),  # of what each name stands for, possibly a picture of another shard
}


def name_key(name: str) -> int:
    """64 bits that stand for a name in a sorted table; equal keys are told apart by the names themselves."""
    return int(name_keys((name,))[0])


def name_keys(names: Iterable[str]) -> np.ndarray:
    """`name_key` of many, uint64 [n]."""
    hashed = b"".join([blake2b(_bytes(name), digest_size=8).digest() for name in names])
    return np.frombuffer(hashed, "<u8").astype(np.uint64, copy=False)


def sha_bytes(sha: str) -> bytes:
    """The 32 bytes of a SHA-256 in hexadecimal. Raises ValueError for anything else."""
    value = bytes.fromhex(sha)
    if len(value) != 32:
        raise ValueError(f"{sha!r} is not a SHA-256 in hexadecimal")
    return value


@dataclass(frozen=True)
class ShardIndex:
    """What one shard holds: its pictures (n) and its names (m)."""

    tensors: Mapping[str, np.ndarray]  # TENSORS

    @classmethod
    def make(cls, pictures: Sequence[tuple[str, SliceLayout]], names: Mapping[str, str]) -> ShardIndex:
        """Of (content hash, layout) in the order of their rows, and name -> content hash."""
        spelled = [_bytes(name) for name in names]
        joined = b"".join(spelled)
        values: dict[str, Any] = {
            "index.sha": b"".join(sha_bytes(sha) for sha, _ in pictures),
            "index.layouts": [[*at.overview, at.rows, at.cols, *at.tile] for _, at in pictures],
            "index.names": joined + b"\0" * (-len(joined) % 8),  # what follows in the file stays aligned
            "index.name_ends": np.cumsum([len(name) for name in spelled]),
            "index.name_keys": name_keys(names),
            "index.name_sha": b"".join(sha_bytes(sha) for sha in names.values()),
        }
        tensors: dict[str, np.ndarray] = {}
        for key, (dtype, row) in TENSORS.items():
            value = values[key]
            array = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.array(value, dtype)
            tensors[key] = array.astype(dtype).reshape(-1, *row)
        return cls(tensors)

    def check(self) -> None:
        """Raises ValueError where the tensors do not belong together."""
        t = self.tensors
        pictures, names = len(t["index.sha"]), len(t["index.name_ends"])
        if len(t["index.layouts"]) != pictures or {len(t["index.name_keys"]), len(t["index.name_sha"])} != {names}:
            raise ValueError("the lengths of the index")
        layouts, ends = t["index.layouts"], t["index.name_ends"]
        if layouts.min(initial=0) < 0 or layouts.max(initial=0) > _MOST:
            raise ValueError("a layout")
        if (
            np.diff(ends, prepend=0).min(initial=0) < 0
            or not 0 <= len(t["index.names"]) - (ends[-1] if names else 0) < 8
        ):
            raise ValueError("the ends of the names")

    @property
    def pictures(self) -> int:
        """How many pictures the shard holds."""
        return len(self.tensors["index.sha"])

    @property
    def name_count(self) -> int:
        """How many names the shard holds."""
        return len(self.tensors["index.name_ends"])

    @cached_property
    def patches(self) -> np.ndarray:
        """Rows of every picture, int64 [n]."""
        oh, ow, rows, cols, th, tw = self.tensors["index.layouts"].astype(np.int64).T
        return oh * ow + rows * cols * th * tw

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of every picture and one behind the last, int64 [n + 1]."""
        return np.concatenate([[0], np.cumsum(self.patches)])

    def sha(self, i: int) -> str:
        """Content hash of picture i."""
        return self.tensors["index.sha"][i].tobytes().hex()

    def layout(self, i: int) -> SliceLayout:
        """Slice shapes of picture i."""
        oh, ow, rows, cols, th, tw = self.tensors["index.layouts"][i].tolist()
        return SliceLayout((oh, ow), rows, cols, (th, tw))

    def name(self, i: int) -> str:
        """Name i; bytes that are no UTF-8 (a damaged shard) become U+FFFD."""
        ends = self.tensors["index.name_ends"]
        text = self.tensors["index.names"][ends[i - 1] if i else 0 : ends[i]].tobytes()
        try:
            return text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return text.decode("utf-8", "replace")

    def names(self) -> Iterator[tuple[str, str]]:
        """Every (name, content hash)."""
        for i in range(self.name_count):
            yield self.name(i), self.tensors["index.name_sha"][i].tobytes().hex()


class Index:
    """All pictures and names of a store.

    A picture that lies in several shards is the one of the first; a name that was given twice stands for the
    later picture; a name whose picture is gone (a shard that was deleted) is not there: `embed` makes it anew.
    """

    def __init__(self, shards: Iterable[ShardIndex]) -> None:
        self._shards = tuple(shards)
        self._first = np.cumsum([0, *(shard.pictures for shard in self._shards)])
        self._first_name = np.cumsum([0, *(shard.name_count for shard in self._shards)])
        self._hashes = _Table([_prefix(shard.tensors["index.sha"]) for shard in self._shards])
        self._keys = _Table([shard.tensors["index.name_keys"] for shard in self._shards])
        self._picture = self._resolve()
        # Of each name only the last entry that leads to a picture counts.
        for group in self._keys.repeated():
            last: dict[str, int] = {}
            for i in group[self._picture[group] >= 0].tolist():
                name = self._name(i)
                if name in last:
                    self._picture[last[name]] = -1
                last[name] = i

    @cached_property
    def count(self) -> int:
        """Names that lead to a picture."""
        return int((self._picture >= 0).sum())

    def names(self) -> Iterator[str]:
        """They, in the order in which they were added."""
        return (self._name(i) for i in np.flatnonzero(self._picture >= 0).tolist())

    def distinct(self) -> np.ndarray:
        """Positions of all pictures, each content once, int64 [n]."""
        kept = np.ones(self._first[-1], np.bool_)
        for group in self._hashes.repeated():
            seen: set[str] = set()
            for i in group.tolist():
                sha = self.sha(i)
                kept[i] = sha not in seen
                seen.add(sha)
        return np.flatnonzero(kept)

    def find_name(self, name: str) -> int | None:
        """Position of the picture that `name` stands for."""
        for i in reversed(self._keys.find(name_key(name)).tolist()):
            if self._picture[i] >= 0 and self._name(i) == name:
                return int(self._picture[i])
        return None

    def find_names(self, names: Sequence[str]) -> np.ndarray:
        """As `find_name` for very many: positions, -1 where there is none, int64 [n].

        By 64-bit keys alone where a key occurs once; `find_name`, which each read uses, compares the names.
        """
        keys = name_keys(names)
        first, count = self._keys.spans(keys)
        found = np.full(len(names), -1, np.int64)
        found[count == 1] = self._picture[first[count == 1]]
        for i in np.flatnonzero(count > 1).tolist():
            position = self.find_name(names[i])
            found[i] = -1 if position is None else position
        return found

    def find_sha(self, sha: str) -> int | None:
        """Position of the picture with that content hash."""
        prefix = int.from_bytes(sha_bytes(sha)[:8], "little")
        return next((i for i in self._hashes.find(prefix).tolist() if self.sha(i) == sha), None)

    def locate(self, position: int) -> tuple[int, int]:
        """(number of the shard, number of the picture in it)."""
        shard = int(self._first.searchsorted(position, side="right")) - 1
        return shard, position - int(self._first[shard])

    def _resolve(self) -> np.ndarray:
        """Position of the picture that each name stands for, -1 where it is in no shard; int32 [m].

        Shard after shard, so that no second copy of all hashes is made.
        """
        resolved = [np.empty(0, np.int32)]
        for shard in self._shards:
            wanted = shard.tensors["index.name_sha"]
            found = self._hashes.find_all(_prefix(wanted))
            numbers = np.searchsorted(self._first, found, side="right") - 1
            for number in np.unique(numbers[found >= 0]).tolist():
                at = np.flatnonzero((found >= 0) & (numbers == number))
                have = self._shards[number].tensors["index.sha"][found[at] - self._first[number]]
                for i in at[(have != wanted[at]).any(1)].tolist():  # the same first 64 bits, another picture
                    position = self.find_sha(wanted[i].tobytes().hex())
                    found[i] = -1 if position is None else position
            resolved.append(found)
        return np.concatenate(resolved)

    def sha(self, position: int) -> str:
        """Content hash of the picture at `position`."""
        shard, i = self.locate(position)
        return self._shards[shard].sha(i)

    def _name(self, i: int) -> str:
        shard = int(self._first_name.searchsorted(i, side="right")) - 1
        return self._shards[shard].name(i - int(self._first_name[shard]))


class _Table:
    """Where 64-bit keys are."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        keys = np.concatenate([np.empty(0, np.uint64), *parts])
        self._order = np.argsort(keys, kind="stable").astype(np.int32)
        self._sorted = keys[self._order]

    def find(self, key: int) -> np.ndarray:
        """All positions of one key, ascending."""
        at, table = np.uint64(key), self._sorted
        first = end = int(table.searchsorted(at))
        while end < len(table) and table[end] == at:
            end += 1
        return self._order[first:end]

    def find_all(self, keys: np.ndarray) -> np.ndarray:
        """The first position of each key, -1 where it is not there."""
        if not len(self._sorted):
            return np.full(len(keys), -1, np.int32)
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[at] == keys, self._order[at], np.int32(-1))

    def spans(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first position of each key (any where there is none), and how many it has: 0, 1, or 2 for more."""
        if not len(self._sorted):
            return np.zeros(len(keys), np.int32), np.zeros(len(keys), np.int64)
        left, last = np.searchsorted(self._sorted, keys), len(self._sorted) - 1
        at, after = np.minimum(left, last), np.minimum(left + 1, last)
        here = self._sorted[at] == keys
        more = here & (after > at) & (self._sorted[after] == keys)
        return self._order[at], here.astype(np.int64) + more

    def repeated(self) -> Iterator[np.ndarray]:
        """The positions of every key that occurs more than once, ascending."""
        equal = self._sorted[1:] == self._sorted[:-1]
        starts = np.flatnonzero(equal & ~np.concatenate([[False], equal[:-1]])) if len(equal) else ()
        for start in starts:
            end = int(np.searchsorted(self._sorted, self._sorted[start], side="right"))
            yield self._order[start:end]


def distinct_layouts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of a table `index.layouts` [n, 6], and which of them each row is, int64 [n].

    As np.unique(axis=0), which compares rows as bytes and takes ten times as long; three numbers fit one of 64 bits.
    """
    halves = (rows[:, :3].astype(np.int64), rows[:, 3:].astype(np.int64))
    a, b = (np.unique((half[:, 0] << 32) + (half[:, 1] << 16) + half[:, 2], return_inverse=True)[1] for half in halves)
    _, first, which = np.unique((a << 32) + b, return_index=True, return_inverse=True)
    return rows[first], which


def _prefix(sha: np.ndarray) -> np.ndarray:
    """The first 64 bits of hashes [n, 32], uint64 [n]."""
    return np.ascontiguousarray(sha[:, :8]).view("<u8")[:, 0]


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")

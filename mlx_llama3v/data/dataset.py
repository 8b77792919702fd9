"""One entry to all data: whatever lies at a path becomes records, and pictures that have names.

`embed` takes the pictures, `train` the records; both read the same here, so that the names agree.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from mlx_llama3v.data.captions import folder_records
from mlx_llama3v.data.folder import PICTURES, files_below, folder_images
from mlx_llama3v.data.hf import Table, arrow_files, is_saved, read_table
from mlx_llama3v.data.llava import read_records, search_folders
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.data.sources import Folders
from mlx_llama3v.data.webdataset import Shard, read_shard
from mlx_llama3v.errors import DataError
from mlx_llama3v.source import Source

_TARS = (".tar",)
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_TABLES = (".parquet",)
_SPLIT = re.compile(r"(?:^|/)(train|test|val|validation|dev)(?=[-_./])")
_MAGIC = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class DataSet:
    """Everything that one --data gave."""

    path: Path
    records: tuple[Record, ...] = ()
    problems: tuple[Problem, ...] = ()
    held: Mapping[str, Source] = field(default_factory=dict)  # pictures that the data holds itself
    home: Path = Path()  # the folder in which names of other pictures start

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all pictures, each once, as a store knows them."""
        return tuple(dict.fromkeys([*self.held, *(name for record in self.records for name in record.images)]))

    def pictures(self, image_folder: str | Path | None = None, *, allow_outside: bool = False) -> dict[str, Source]:
        """Where every picture is, by name. What may not be read is a `Refused`. See llava.search_folders."""
        folders = search_folders(self.home, image_folder, allow_outside=allow_outside)
        own = Folders([self.path], allow_outside=allow_outside)  # of a folder of pictures
        found: dict[str, Source] = {}
        for name in self.names:
            source = self.held.get(name)
            if source is None:
                source = folders.find(name)
            elif isinstance(source, Path):
                source = own.check(name, source)
            found[name] = source
        return found


def read_data(path: str | Path, *, allow_outside: bool = False) -> DataSet:
    """Read a data set of any kind; the pictures' bytes are not touched.

    | path | read as |
    |---|---|
    | .json, .jsonl, any other file | LLaVA and its kin (llava.py) |
    | .parquet, a folder of them | Hugging Face rows (hf.py) |
    | a folder that `save_to_disk` wrote | the same |
    | .tar, a folder of them | WebDataset shards (webdataset.py) |
    | a pattern (`train-*.parquet`, `shard-{000..010}.tar`) | what it matches |
    | any other folder | its pictures, with what stands beside them (captions.py) |

    With `allow_outside`, links in a folder of pictures to folders elsewhere are followed.

    Raises DataError: nothing there, nothing usable, several kinds or several splits at once.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, allow_outside)
    if path.exists() or not _MAGIC.search(str(path)):
        if path.name.lower().endswith((*_TARS, *_TABLES, *_PACKED, ".arrow")):
            return _read_files(path, [path], path.parent)
        if path.name.lower().endswith(PICTURES):
            raise DataError(f"{path} is a picture; expected a file that names pictures, or a folder of them.")
        file = read_records(path)
        return DataSet(path, file.records, file.problems, home=path.parent)
    files, missing = expand(str(path))
    home = Path(*_before_magic(path))
    if not files:
        raise DataError(f"{path} matches no file.")
    strange = [file for file in files if not file.name.lower().endswith((*_TARS, *_TABLES, ".arrow"))]
    if strange:
        raise DataError(f"{path} matches {strange[0]}; a pattern takes .tar and .parquet files.")
    read = _read_files(path, files, home)
    problems = [Problem(str(name), "it does not exist") for name in missing]
    return DataSet(path, read.records, (*problems, *read.problems), read.held, read.home)


def _before_magic(path: Path) -> list[str]:
    """The folders of a pattern that are plain."""
    parts = list(path.parts[:-1])
    return parts[: next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts))]


def expand(pattern: str) -> tuple[list[Path], list[Path]]:
    """Files that a pattern with * ? [] {a,b} {000..010} matches, in order, and names it spells that do not exist."""
    found: dict[Path, None] = {}
    missing = []
    for name in _braces(pattern):
        matched = sorted(glob.glob(name)) if glob.has_magic(name) else [name] if Path(name).is_file() else []
        found.update((Path(match), None) for match in matched if Path(match).is_file())
        if not matched:
            missing.append(Path(name))
    return list(found), missing


def _braces(pattern: str, most: int = 1_000_000) -> list[str]:
    """Raises DataError for a pattern that spells more than `most` names."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices, count = [], 1
    for i, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if i % 2 == 0:
            choices.append([piece])
        elif span:
            first, last = span.groups()
            if abs(int(last) - int(first)) >= most:
                raise DataError(f"{pattern} stands for more than {most} files.")
            steps = (
                range(int(first), int(last) + 1) if int(first) <= int(last) else range(int(first), int(last) - 1, -1)
            )
            width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
            choices.append([f"{n:0{width}d}" for n in steps])
        else:
            choices.append(piece.split(","))
        count *= len(choices[-1])
    if count > most:
        raise DataError(f"{pattern} stands for more than {most} files.")
    return ["".join(choice) for choice in product(*choices)]


def _read_folder(folder: Path, allow_outside: bool) -> DataSet:
    if is_saved(folder):
        return _read_files(folder, arrow_files(folder), folder)
    found, unread = files_below(folder, (*_TARS, *_TABLES, *_PACKED))
    kinds: dict[str, list[Path]] = {}
    for file in sorted(found):
        kind = next(kind for kind in (_TARS, _TABLES, _PACKED) if file.name.lower().endswith(kind))
        kinds.setdefault(kind[0], []).append(file)
    if not kinds:
        pictures, problems = folder_images(folder, allow_outside=allow_outside)
        records, unfit = folder_records(folder, pictures, allow_outside=allow_outside)
        return DataSet(folder, tuple(records), (*problems, *unfit), dict(pictures), folder)
    if len(kinds) > 1 or files_below(folder, PICTURES)[0]:
        raise DataError(f"{folder} holds {' and '.join(kinds)} files beside others; give a pattern, as {folder}/*.tar.")
    ending, files = next(iter(kinds.items()))
    splits = {match[1]: file for file in files if (match := _SPLIT.search(file.relative_to(folder).as_posix()))}
    if len(splits) > 1:
        split, file = max(splits.items())  # after "test" in the alphabet: "train", where it is there
        one = f"{file.parent}/{split}*{ending}" if file.name.startswith(split) else file.parent
        raise DataError(f"{folder} holds the splits {', '.join(sorted(splits))}; give one, as '{one}'.")
    read = _read_files(folder, files, folder)
    return replace(read, problems=(*unread, *read.problems))


def _read_files(path: Path, files: list[Path], home: Path) -> DataSet:
    """Shards or tables. One that cannot be read is a Problem, unless none can."""
    records: list[Record] = []
    problems: list[Problem] = []
    held: dict[str, Source] = {}
    errors = []
    for file in files:
        name = file.relative_to(home).as_posix()
        try:
            read: Shard | Table = (
                read_shard(file, name) if file.suffix not in (".parquet", ".arrow") else read_table(file, name)
            )
        except DataError as error:
            errors.append(error)
            problems.append(Problem(name, str(error).rstrip(".")))
            continue
        records += read.records
        problems += read.problems
        held.update(read.pictures)
    if len(errors) == len(files):
        raise errors[0] if errors else DataError(f"{path} holds no data.")
    if not held and not records:
        why = f"; the first problem: {problems[0]}" if problems else ""
        raise DataError(f"{path} holds neither a picture nor a conversation{why}.")
    return DataSet(path, tuple(records), tuple(problems), held, home)

"""Pictures that lie in folders: known by the endings of their names alone."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from mlx_llama3v.data.records import Problem
from mlx_llama3v.errors import DataError

_JPEG = (".jpg", ".jpeg", ".jfif", ".jpe")
PICTURES = (*_JPEG, ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".jp2")
_UNREADABLE = (".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")


def folder_images(folder: str | Path, *, allow_outside: bool = False) -> tuple[dict[str, Path], list[Problem]]:
    """The pictures of a folder and those below it, by name relative to it, sorted; and what else looks like one
    or cannot be read.

    Hidden files are left out. Links to folders elsewhere are followed with `allow_outside`, and are Problems without.
    Raises DataError when it is no folder or holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of pictures.")
    files, problems = _walk(folder, allow_outside)
    found = {}
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        if why := unreadable(name):
            problems.append(Problem(name, why))
        elif os.path.isfile(file):
            found[name] = file
        else:
            problems.append(Problem(name, "it is a broken link, no file, or must not be read"))
    if not found:
        why = f"; the first problem: {problems[0]}" if problems else ""
        raise DataError(f"{folder} holds no picture ({', '.join(PICTURES)}){why}.")
    return found, problems


def unreadable(name: str) -> str:
    """Why a file that is named as a picture cannot be one here; empty where it can, or is named otherwise."""
    ending = os.path.splitext(name)[1].lower()
    return f"{ending} is a format that cannot be read; make a JPEG or PNG of it" if ending in _UNREADABLE else ""


def _looks(name: str) -> bool:
    return name.lower().endswith((*PICTURES, *_UNREADABLE))


def _walk(folder: Path, allow_outside: bool) -> tuple[list[Path], list[Problem]]:
    """All files that look like pictures and are not hidden. Every real folder is entered once, by its own name where it
    has one here."""
    root, seen = os.path.realpath(folder), set[str]()
    files: list[Path] = []
    problems: list[Problem] = []
    waiting = [folder]
    for start in waiting:  # grows by the links that are found
        real = os.path.realpath(start)
        inside = real == root or real.startswith(root.rstrip(os.sep) + os.sep)
        if not inside and not allow_outside:
            name = start.relative_to(folder).as_posix()
            problems.append(Problem(name, "it is a link to a folder outside: --allow-outside follows it"))
            continue
        for place, folders, names in os.walk(start, onerror=partial(_note, folder, problems)):
            real = os.path.realpath(place)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
            if real not in seen:
                files += [Path(place, name) for name in names if not name.startswith(".") and _looks(name)]
                waiting += [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
            seen.add(real)
    return files, problems


def files_below(folder: Path, endings: tuple[str, ...]) -> tuple[list[Path], list[Problem]]:
    """All files below a folder whose names end so, unsorted; nothing hidden; links to folders are not followed. And the
    folders that cannot be read."""
    found: list[Path] = []
    problems: list[Problem] = []
    for place, folders, files in os.walk(folder, onerror=partial(_note, folder, problems)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if name.lower().endswith(endings) and not name.startswith(".")]
    return found, problems


def _note(folder: Path, problems: list[Problem], error: OSError) -> None:
    """A folder below that cannot be listed."""
    where = Path(error.filename).relative_to(folder).as_posix()
    problems.append(Problem(where, f"this folder cannot be read ({error.strerror or error}), so nothing in it is used"))

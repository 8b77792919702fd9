"""What stands beside a picture, in a shard or a folder: a caption, or a conversation in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from mlx_llama3v.data.llava import caption_row

TEXTS = (".txt", ".caption", ".cap")
MOST_TEXT = 16 << 20  # bytes of one caption or conversation


class Unfit(Exception):
    """Why the words of a picture cannot be used."""


def row_beside(pictures: list[str], words: Mapping[str, bytes]) -> dict[str, Any] | None:
    """A row of llava.py of the pictures and the files "txt" and "json" beside them; None where these say nothing.

    Raises Unfit.
    """
    try:
        values = json.loads(words["json"]) if "json" in words else {}
        text = words["txt"].decode("utf-8-sig") if "txt" in words else None
    except (ValueError, RecursionError) as error:
        raise Unfit(f"its text is not readable ({error})") from error
    return row_of(pictures, values, text)


def row_of(pictures: list[str], values: Any, text: str | None) -> dict[str, Any] | None:
    """The same of parsed JSON: a conversation, or an object with a caption, for which `text` is taken if given.

    Raises Unfit.
    """
    if isinstance(values, list):
        values = {"conversations": values}
    if isinstance(values, dict) and ("conversations" in values or "messages" in values):
        named = _matched(values.get("image", values.get("images")), pictures)
        if named is None:
            raise Unfit("its conversation names other pictures than it holds")
        return {**values, "image": None, "images": named}
    caption = text if text is not None else values.get("caption") if isinstance(values, dict) else None
    if not isinstance(caption, str):
        return None
    if not pictures:
        raise Unfit("its text has no picture next to it in the shard; sort the shard by name")
    return caption_row(pictures, caption)


def _matched(named: Any, pictures: list[str]) -> list[str] | None:
    """The sample's own pictures for the names in its conversation: by file name, else in their order."""
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names:
        return pictures
    files = {PurePosixPath(picture).name: picture for picture in pictures}
    found = [files.get(PurePosixPath(name).name) if isinstance(name, str) else None for name in names]
    if all(found):
        return [picture for picture in found if picture]
    return pictures if len(names) == len(pictures) else None

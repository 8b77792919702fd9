"""Reads training conversations: LLaVA's own format and the dialects that grew from it, in JSON or JSON lines.

| keys of a row | pictures |
|---|---|
| `conversations: [{from, value}]` (LLaVA) | `image: str or [str]`, `system_prompt` beside it |
| `messages: [{role, content: str}]` (ShareGPT) | `images: [str]` |
| `messages: [{role, content: [parts]}]` (OpenAI-like) | parts `image_url` or `image` of a turn |

Placeholders (`<image>`, `<IMG_CONTEXT>`) say which turn brings a picture; they are removed from the text, for
where it stands inside a turn is decided by the prompt layout alone (DESIGN 6).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from mlx_llama3v.data.records import Problem, Record, RecordFile, collector_paused
from mlx_llama3v.data.sources import Folders
from mlx_llama3v.errors import DataError
from mlx_llama3v.source import Source
from mlx_llama3v.text.prompt import Message

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "pretrain": "pretrain",  # one turn that is a caption with its pictures
}
_DATA = "data:"  # begins a URL that is the picture itself
_HALF = re.compile("[\ud800-\udfff]")  # half an emoji, which JSON can spell and no tokenizer takes
_PLACEHOLDER = re.compile(r"<image>|<IMG_CONTEXT>")
_PLACEHOLDERS = re.compile(rf"\s*(?:(?:{_PLACEHOLDER.pattern})\s*)+")


class _Refused(Exception):
    """Why one row cannot be used; becomes its Problem."""


class _PlainTurn(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    said: Literal["human", "gpt"] = msgspec.field(name="from")
    text: str = msgspec.field(name="value")


class _PlainRow(msgspec.Struct, gc=False):
    """The commonest row: LLaVA's keys, at most one picture. Others may stand beside, but for those that say more."""

    conversations: Annotated[list[_PlainTurn], msgspec.Meta(min_length=1)]
    image: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    id: str | int | float | None = None
    messages: UnsetType = UNSET
    images: UnsetType = UNSET
    system_prompt: UnsetType = UNSET
    video: UnsetType = UNSET
    videos: UnsetType = UNSET
    audio: UnsetType = UNSET
    audios: UnsetType = UNSET


_parse_rows: Callable[[str], list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw]).decode
_parse_plain: Callable[[msgspec.Raw], _PlainRow] = msgspec.json.Decoder(_PlainRow).decode


def read_records(path: str | Path) -> RecordFile:
    """Read one data file. A row that cannot be used becomes a Problem with its line or record number.

    Raises DataError naming the file and position when it is not JSON, or holds no list of rows.
    """
    path = Path(path)
    records, problems = [], []
    with collector_paused():
        for where, number, row in _rows(path):
            where = f"{path.name}: {where}"
            read = (_read_json if isinstance(row, msgspec.Raw) else read_row)(row, number, where)
            if isinstance(read, Record):
                records.append(read)
            else:
                problems.append(read)
    return RecordFile(path, tuple(records), tuple(problems))


def read_row(row: Any, number: int | str, where: str) -> Record | Problem:
    """One parsed row of any dialect; `number` is its id where it has none, `where` what a Problem says."""
    try:
        return _converted(row, number) or _record(row, number)
    except _Refused as refused:
        return Problem(where, str(refused))


def _converted(row: Any, number: int | str) -> Record | None:
    """`_plain_record` of a parsed row."""
    try:
        return _plain_record(msgspec.convert(row, _PlainRow), number)
    except msgspec.ValidationError:
        return None


def _read_json(text: msgspec.Raw, number: int, where: str) -> Record | Problem:
    """One row from its JSON. msgspec reads the commonest in a fifth of the time; it refuses what `json` refuses and
    more (NaN, half an emoji), so what it refuses `json` looks at, and says what is wrong.
    """
    try:
        if record := _plain_record(_parse_plain(text), number):
            return record
    except (ValueError, RecursionError):
        pass
    try:
        row = json.loads(bytes(text).decode())
    except (ValueError, RecursionError) as error:
        return Problem(where, f"not JSON ({str(error).replace('line 1 column', 'column')})")
    return read_row(row, number, where)


def caption_row(pictures: list[str], caption: str) -> dict[str, Any]:
    """A row in which nothing is asked."""
    talk = [{"from": "human", "value": ""}, {"from": "gpt", "value": caption}]
    return {"conversations": talk, "images": pictures}


def _rows(path: Path) -> Iterator[tuple[str, int, Any]]:
    """(where, number from 1, row, parsed or as its JSON) of each row, whatever the name says of JSON lines."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    if not text.strip():
        raise DataError(f"{path} is empty; expected a list of conversations.")
    if not text.lstrip().startswith("[") and (path.suffix == ".jsonl" or _starts_with_line(text)):
        yield from _lines(text)
        return
    try:
        rows = _json_rows(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); expected a list of conversations.") from error
    if isinstance(rows, dict) and _is_row(rows):
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f"{path} holds one {type(rows).__name__}; expected a list of conversations.")
    for number, row in enumerate(rows, 1):
        yield f"record {number}", number, row


def _json_rows(text: str) -> Any:
    """The JSON; of a list, its rows not yet parsed where that goes. Raises ValueError, RecursionError."""
    try:
        return _parse_rows(text)
    except (ValueError, RecursionError):  # a single row, what only `json` takes, or no JSON: that says where
        return json.loads(text)


def _starts_with_line(text: str) -> bool:
    """Whether the first line is a JSON object of its own: JSON lines under another name."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def _lines(text: str) -> Iterator[tuple[str, int, Any]]:
    # Not splitlines(): it also cuts at U+2028 and its kin, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", number, msgspec.Raw(line)


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and ("conversations" in row or "messages" in row)


def _plain_record(row: _PlainRow, number: int | str) -> Record | None:
    """The commonest row, in a fifth of the time: one picture whose placeholder opens or ends the first turn, or none.

    None where anything is otherwise: then `_record` looks, and says what is wrong.
    """
    image = row.image
    if image is not None and image.startswith(_DATA):
        return None
    messages: list[Message] = []
    for turn in row.conversations:
        said = turn.text
        if not said.isascii() and _HALF.search(said):
            return None
        if turn.said == "gpt":
            messages.append(Message("assistant", said))
            continue
        text: str | None = said
        images: tuple[int, ...] = ()
        if image is not None and not messages:
            text, images = _behind_placeholder(said), (0,)
        if text is None or ("<" in text and _PLACEHOLDER.search(text)):
            return None
        messages.append(Message("user", text, images))
    if image is not None and not messages[0].images:
        return None
    name = row.id
    return Record(str(number if name is None else name), () if image is None else (image,), tuple(messages))


def _behind_placeholder(text: str) -> str | None:
    """The text without the placeholder on its first or last line; None where there is none."""
    if text.startswith("<image>\n"):
        return text[8:].strip()
    return text[:-8].strip() if text.endswith("\n<image>") else None


def _record(row: Any, number: int | str) -> Record:
    """One row of any dialect. Raises _Refused."""
    if not _is_row(row):
        what = f"an object with the keys {', '.join(row)}" if isinstance(row, dict) else repr(row)
        raise _Refused(f"it is {what:.80}; expected 'conversations' or 'messages'")
    for key in ("video", "videos", "audio", "audios"):
        if row.get(key):
            raise _Refused(f"it has a {key.rstrip('s')}; only pictures are supported")
    turns = row["conversations"] if "conversations" in row else row["messages"]
    if not isinstance(turns, list) or not turns:
        raise _Refused("its conversation is not a list of turns")
    pictures = _Pictures(_names(row.get("image")) + _names(row.get("images")))
    messages = [message for turn in turns for message in _messages(turn, pictures)]
    messages = pictures.give_rest(messages)
    if prompt := row.get("system_prompt"):
        messages.insert(0, Message("system", _string(prompt)))
    name = row.get("id")
    return Record(str(number if name is None else name), tuple(pictures.names), tuple(messages))


class _Pictures:
    """The pictures of one row and which turn brings them."""

    def __init__(self, names: list[str]) -> None:
        self.names = names  # grows by those that stand in the turns themselves
        self._listed = len(names)
        self._next = 0

    def claim(self, own: list[str], placeholders: int) -> tuple[int, ...]:
        """Indices of a turn's pictures: its own, then a listed one for each further placeholder."""
        first, wanted = len(self.names), max(0, placeholders - len(own))
        self.names += own
        if self._next + wanted > self._listed:
            raise _Refused("it has more image placeholders than pictures")
        self._next += wanted
        return (*range(first, first + len(own)), *range(self._next - wanted, self._next))

    def give_rest(self, messages: list[Message]) -> list[Message]:
        """Listed pictures without a placeholder go to the first user turn, after those it has."""
        rest = tuple(range(self._next, self._listed))
        if not rest:
            return messages
        at = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if at is None:
            raise _Refused("it has pictures but no user turn")
        user = messages[at]
        messages[at] = Message(user.role, user.text, user.images + rest)
        return messages


def _messages(turn: Any, pictures: _Pictures) -> list[Message]:
    """One turn; a `pretrain` turn becomes the pair (pictures, caption)."""
    if not isinstance(turn, dict):
        raise _Refused(f"a turn is {turn!r:.40}, expected an object")
    given = turn.get("role", turn.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise _Refused(f"a turn has the role {given!r:.40}; expected one of {', '.join(_ROLES)}")
    text, own, more = _content(turn.get("content", turn.get("value")))
    if role == "assistant":  # What a model says is never a placeholder.
        if own or more:
            raise _Refused("an answer holds a picture")
        return [Message(role, text)]
    images = pictures.claim(own, max(len(_PLACEHOLDER.findall(text)), len(own) + more))
    text = _without_placeholders(text)
    if role == "pretrain":
        return [Message("user", "", images), Message("assistant", text)]
    if role == "system" and images:
        raise _Refused("a system turn holds a picture")
    return [Message(role, text, images)]


def _without_placeholders(text: str) -> str:
    """What remains keeps its words apart: by the line break that was there, else by a space."""
    if not _PLACEHOLDER.search(text):
        return text
    return _PLACEHOLDERS.sub(lambda match: "\n" if "\n" in match[0] else " ", text).strip()


def _content(content: Any) -> tuple[str, list[str], int]:
    """Text, own pictures, and how many of the row's, of one turn, which may be a string or a list of typed parts."""
    if not isinstance(content, list):
        return _string(content), [], 0
    texts, own, more = [], [], 0
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_string(part.get("text", part.get("value"))))
        elif kind in ("image", "image_url"):
            names = _names(part.get(kind, part.get("value")))
            own += names
            more += not names  # {"type": "image"}, as in Hugging Face's data sets: the row's next picture
        else:
            raise _Refused(f"a part has the type {kind!r:.40}; expected text, image or image_url")
    return "\n".join(texts), own, more


def _names(value: Any) -> list[str]:
    """Picture names in any spelling: "a.jpg", ["a.jpg"], {"url": "a.jpg"}, {"path": "a.jpg"}, none."""
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [name for item in value for name in _names(item)]
    if isinstance(value, dict):
        value = value.get("url", value.get("path"))
    if not isinstance(value, str) or not value:
        raise _Refused(f"a picture is given as {value!r:.40}; expected its file name")
    if value.startswith(_DATA):
        raise _Refused(f"a picture is given as its bytes ({value:.30}...); save it to a file and give that file's name")
    return [value]


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise _Refused(f"a text is {value!r:.40}; expected a string")
    if half := _HALF.search(value):
        raise _Refused(f"a text is not valid Unicode at character {half.start()}")
    return value


def search_folders(home: Path, image_folder: str | Path | None = None, *, allow_outside: bool = False) -> Folders:
    """Where the pictures that data in the folder `home` names are looked up, and which they may not leave.

    `image_folder` alone where one is given, else `home` and three folders above it (the root of the file system
    is not one of them: everything lies in it). With `allow_outside` all of these, and names may lead anywhere.
    """
    home = home.resolve()
    near = [folder for folder in (home, *list(home.parents)[:3]) if folder != Path(home.anchor) or folder == home]
    given = [Path(image_folder)] if image_folder is not None else []
    return Folders(given + near if allow_outside or not given else given, allow_outside=allow_outside)


def image_paths(
    file: RecordFile, image_folder: str | Path | None = None, *, allow_outside: bool = False
) -> dict[str, Source]:
    """Where the pictures of a data file lie: by name, in the order of their first use. See search_folders."""
    folders = search_folders(file.path.parent, image_folder, allow_outside=allow_outside)
    return {name: folders.find(name) for name in file.images}

"""A Jinja chat template -> the pieces of a PromptLayout, found by rendering it around marks.

Templates are programs; what this package needs of them is what stands around the messages. The pieces are checked by
putting conversations together again: a template that does more than place messages is not used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.layout import PromptLayout
from mlx_llama3v.tensors import read_json

_SYSTEM, _FIRST, _ANSWER, _SECOND = "⟦system⟧", "⟦first⟧", "⟦answer⟧", "⟦second⟧"
_ENDS = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}
_CONTROL = re.compile(r"\s*<[^<>\s]+>")


def find_template(directory: Path) -> str | None:
    """The chat template of a checkpoint: its own file, or an entry of a JSON file."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = directory / name
        found = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, list):  # several under names, old style
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def read_layout(directory: Path, image_token: str = "<image>") -> PromptLayout | None:
    """The layout that a checkpoint's chat template writes; None where it has none.

    Raises CheckpointError for a template that this reading does not reproduce.
    """
    template = find_template(directory)
    if template is None:
        return None
    path = directory / "tokenizer_config.json"
    named = read_json(path) if path.is_file() else {}
    bos, eos = (_token(named.get(f"{name}_token"), default) for name, default in _ENDS.items())
    try:
        return _layout(_renderer(template, bos, eos), bos, image_token)
    except _Unreadable as error:
        raise CheckpointError(
            f"{directory}: the chat template cannot be read as a prompt layout ({error}); "
            "choose one with --prompt-layout."
        ) from None


def _token(value: Any, default: str) -> str:
    """A token as tokenizer_config.json has it: text, or an object; `default` where it is missing or null."""
    return str((value.get("content") if isinstance(value, dict) else value) or default)


class _Unreadable(Exception):
    """What keeps a template from being taken apart."""


def _renderer(template: str, bos: str, eos: str) -> Any:
    """`template` as transformers renders it, but for the clock. Raises _Unreadable where it cannot be compiled."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}..{% endgeneration %}, which marks answers for trainers and writes nothing."""

        tags = {"generation"}  # noqa: RUF012 (so jinja2 has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False)

    def fail(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = fail  # no strftime_now: a prompt must not change with the day

    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise _Unreadable(str(error)) from error

    def render(*turns: tuple[str, Any]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            asked = messages[-1]["role"] == "user"
            return str(compiled.render(messages=messages, add_generation_prompt=asked, bos_token=bos, eos_token=eos))
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise _Unreadable(str(error)) from error

    return render


def _layout(render: Any, bos: str, image_token: str) -> PromptLayout:
    """The pieces, checked. Raises _Unreadable."""

    def cut(text: str, *marks: str) -> list[str]:
        parts = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                raise _Unreadable(f"it leaves out a message: {text[:40]!r}")
            parts.append(before)
        return [*parts, text]

    listed, wrap = _content_form(render)
    before, asked = cut(render(("user", wrap(_FIRST))), _FIRST)
    talk = ("user", wrap(_FIRST)), ("assistant", wrap(_ANSWER)), ("user", wrap(_SECOND))
    first, replied, between, last = cut(render(*talk), _FIRST, _ANSWER, _SECOND)
    if first != before or last != asked or not replied.startswith(asked):
        raise _Unreadable("it writes a turn differently the second time")
    start = bos if before.startswith(bos) else ""
    control = _CONTROL.match(between)
    if control is None:
        raise _Unreadable("nothing ends an answer")
    user_header = os.path.commonprefix([before[::-1], between[control.end() :][::-1]])[::-1]
    end = between.removesuffix(user_header)
    user_end = end if asked.startswith(end) else ""
    head, after = "", ""
    with suppress(_Unreadable):  # a template without system turns
        head, after, _ = cut(render(("system", wrap(_SYSTEM)), ("user", wrap(_FIRST))), _SYSTEM, _FIRST)
    system, default = "{text}", None
    if head or after:
        if not after.endswith(user_header):
            raise _Unreadable("its first user turn after a system turn differs")
        system = head.removeprefix(start) + "{text}" + after.removesuffix(user_header)
    opening = before.removeprefix(start)
    if opening != user_header:  # a system turn comes without being asked for: Llama 3.1's date
        shell = system.partition("{text}")
        rest = opening.removesuffix(user_header)
        if not (rest.startswith(shell[0]) and rest.endswith(shell[2])):
            start, default = start + rest, None  # words of its own: they become part of the start
        else:
            default = rest[len(shell[0]) : len(rest) - len(shell[2])]
    layout = PromptLayout(
        name="chat template",
        start=start,
        system=system,
        default_system=default,
        user=user_header + "{images}{text}" + user_end,
        assistant=asked.removeprefix(user_end),
        answer=replied.removeprefix(asked) + "{text}",
        end=end,
        picture=_picture(render, image_token) if listed else "{overview}{slices}\n",
    )
    system_turn = ("system", wrap(_SYSTEM))
    for turns in (talk, (system_turn, *talk)) if head or after else (talk,):
        told = [(role, text if isinstance(text, str) else text[0]["text"]) for role, text in turns]
        if _written(layout, told) != render(*turns):
            raise _Unreadable("it does more than place messages")
    return layout


def _written(layout: PromptLayout, turns: Sequence[tuple[str, str]]) -> str:
    """What `layout` makes of a conversation that ends with a user's turn."""
    pieces = {
        "system": layout.system,
        "user": layout.user.replace("{images}", ""),
        "assistant": layout.assistant + layout.answer + layout.end,
    }
    if layout.default_system is not None and turns[0][0] != "system":
        turns = [("system", layout.default_system), *turns]
    told = (pieces[role].replace("{text}", text) for role, text in turns)
    return layout.start + "".join(told) + layout.assistant


def _content_form(render: Any) -> tuple[bool, Any]:
    """Whether a template takes content as a list of parts, and how a text is given to it."""

    def as_list(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    try:
        text = render(("user", as_list(_FIRST)))
        if _FIRST in text and "'type'" not in text:
            return True, as_list
    except _Unreadable:
        pass
    return False, lambda text: text


def _picture(render: Any, image_token: str) -> str:
    """What a template writes around a picture before the text of its turn."""
    with_image = render(("user", [{"type": "image"}, {"type": "text", "text": _FIRST}]))
    without = render(("user", [{"type": "text", "text": _FIRST}])).partition(_FIRST)[0]
    inserted = with_image.partition(_FIRST)[0].removeprefix(without)
    if inserted.count(image_token) != 1:
        return "{overview}{slices}\n"
    return inserted.replace(image_token, "{overview}{slices}")

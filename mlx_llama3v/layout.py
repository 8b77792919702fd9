"""How a finished model wants its turns written: a value in `config.json`, not an `if` in the model.

The pieces are text with the control tokens spelled out ("<|eot_id|>"); only code inserts them, and a message that
spells one stays plain text. `{text}` is the message, `{images}` its pictures, `{visual}` the visual tokens of one
slice, `{n}` the picture's number from 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_llama3v.errors import CheckpointError

_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"


def _turn(role: str, content: str) -> str:
    return _HEADER.replace("{role}", role) + content


@dataclass(frozen=True)
class PromptLayout:
    """The pieces of a conversation; the defaults are Llama-3's turns with `<image>\\n` before the text."""

    name: str = "llama3"
    markers: bool = False  # the joint sequence of DESIGN 6, with marker vectors; then the pieces are not used
    start: str = "<|begin_of_text|>"
    system: str = _turn("system", "{text}<|eot_id|>")
    default_system: str | None = None  # text of the system turn where the conversation has none; None: no such turn
    user: str = _turn("user", "{images}{text}<|eot_id|>")
    assistant: str = _turn("assistant", "")
    answer: str = "{text}"
    end: str = "<|eot_id|>"  # what ends an answer
    picture: str = "{overview}{slices}\n"
    overview: str = "{visual}"
    slices: str = "{tiles}"
    tile: str = "{visual}"
    col: str = ""  # between the tiles of a row
    row: str = "\n"  # between rows


_BUNNY_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_VILA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA3 = PromptLayout()
_VICUNA = PromptLayout(
    "vicuna",
    system="{text} ",
    default_system=_BUNNY_SYSTEM,
    user="USER: {images}{text} ",
    assistant="ASSISTANT:",
    answer=" {text}",
    end="<|end_of_text|>",
)
_END = "<|end_of_text|>"
_VILA = PromptLayout(
    "vila",
    system=_turn("system", "{text}" + _END),
    default_system=_VILA_SYSTEM,
    user=_turn("user", "{images}{text}" + _END),
    assistant=_turn("system", ""),  # sic: the role word of the branch that trained it
    end=_END,
)
LAYOUTS = {
    layout.name: layout
    for layout in (
        PromptLayout("llama3v", markers=True),
        _LLAMA3,
        replace(_LLAMA3, name="vision-alpha", picture="{overview}{slices}"),
        replace(_LLAMA3, name="mantis", picture="{overview}{slices}", overview="(image {n}: <Image>{visual}</Image>)"),
        _VICUNA,
        replace(
            _LLAMA3,
            name="minicpm",
            overview="<image>{visual}</image>",
            slices="<slice>{tiles}</slice>",
            tile="<image>{visual}</image>",
        ),
        _VILA,
        replace(_LLAMA3, name="vila-llama3", default_system=_VILA_SYSTEM),
    )
}


def named_layout(name: str) -> PromptLayout:
    """One of LAYOUTS. Raises CheckpointError for another name."""
    if name not in LAYOUTS:
        raise CheckpointError(f"prompt layout is {name!r}; expected one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]

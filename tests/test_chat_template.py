"""Chat templates of Llama 3.0, 3.1 and 3.2, and of processors: read as a layout that writes the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_llama3v.config import ProjectorConfig, SliceLayout
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.layout import LAYOUTS
from mlx_llama3v.text.prompt import Message, render
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.weights.chat_template import read_layout
from tests.hf_llama import CHAT_TEMPLATE, tiny_tokenizer, write_tokenizer

_ROLE = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
_TURN = _ROLE + " + message['content'] | trim + '<|eot_id|>'"
_HEADER = "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
LLAMA_30 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = " + _TURN + " %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}" + _HEADER
)
LLAMA_31 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n{%- set date_string = DATE %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n{%- set system_message = messages[0]['content']|trim %}\n"
    "{%- set messages = messages[1:] %}\n{%- else %}\n{%- set system_message = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{{- 'Cutting Knowledge Date: December 2023\\n' }}\n"
    "{{- 'Today Date: ' + date_string + '\\n\\n' }}\n{{- system_message }}\n{{- '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n{{- " + _TURN + " }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n" + _HEADER + "\n{%- endif %}\n"
)
LLAMA_32 = LLAMA_31.replace("DATE", "strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024'")
LISTED = (
    "{{ bos_token }}{% for message in messages %}{{ " + _ROLE + " }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}" + _HEADER.replace("\\n", "\n") + "{% endif %}"
)
_PLAIN = "{% if message['role'] == 'system' %}{{ message['content'] }} {% elif message['role'] == 'user' %}"
VICUNA = (
    "{{ bos_token }}{% for message in messages %}" + _PLAIN + "USER: {{ message['content'] }} {% else %}"
    "ASSISTANT: {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MARKED = (  # for trainers, and with a loop that is left
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'tool' %}{% continue %}{% endif %}"
    "{{ " + _ROLE + " }}{% generation %}{{ message['content'] + '<|eot_id|>' }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}" + _HEADER + "{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|reserved_special_token_0|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|reserved_special_token_1|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|reserved_special_token_0|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "3.0": LLAMA_30,
    "3.1": LLAMA_31.replace("DATE", "'26 Jul 2024'"),
    "3.2": LLAMA_32,
    "plain": CHAT_TEMPLATE,
    "list": LISTED,
    "vicuna": VICUNA,
    "marked": MARKED,
    "chatml": CHATML,
}
CONVERSATIONS = (
    [("user", "What is it?")],
    [("system", "Be short."), ("user", "What is it?")],
    [("user", "a"), ("assistant", "It says stop."), ("user", "Sure?")],
    [("system", "Be short."), ("user", "a"), ("assistant", "It says stop."), ("user", "Sure?")],
)


def checkpoint(directory: Path, template: str) -> Path:
    write_tokenizer(directory, tiny_tokenizer())
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return directory


def ours(layout: Any, turns: list[tuple[str, str]]) -> list[int]:
    tokens = Tokens(tiny_tokenizer(), layout=layout)
    messages = [Message(role, text) for role, text in turns]
    return render(messages, [], tokens, ProjectorConfig("mlp"), generate=True).ids.tolist()


def theirs(directory: Path, turns: list[tuple[str, str]]) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    messages = [{"role": role, "content": text} for role, text in turns]
    found = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
    )
    return list(found)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_layout_writes_what_the_template_writes(name: str, turns: list[tuple[str, str]], tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, TEMPLATES[name])
    layout = read_layout(directory)
    assert layout is not None
    found = ours(layout, turns)
    assert found == theirs(directory, turns)
    assert found.count(Tokens(tiny_tokenizer()).bos) == (name != "chatml")
    if name in ("3.1", "3.2"):  # the layout is felt: 3.0's is another prompt, and no clock is read
        assert found != ours(LAYOUTS["llama3"], turns)
        assert "26 Jul 2024" in str(layout)


def test_where_a_template_puts_the_picture(tmp_path: Path) -> None:
    layouts = {name: read_layout(checkpoint(tmp_path / name, TEMPLATES[name])) for name in ("3.0", "list")}
    assert layouts["3.0"] is not None and layouts["3.0"].picture == "{overview}{slices}\n"  # LLaVA's own way
    assert layouts["list"] is not None and layouts["list"].picture == "{overview}{slices}"


def test_a_template_in_a_file_of_its_own_wins(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, LLAMA_30)
    (directory / "chat_template.jinja").write_text(TEMPLATES["3.1"])
    layout = read_layout(directory)
    assert layout is not None and layout.default_system is not None


def test_no_template_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, LLAMA_30)
    (directory / "tokenizer_config.json").write_text("{}")
    assert read_layout(directory) is None
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] | length }}")
    with pytest.raises(CheckpointError, match="--prompt-layout"):
        read_layout(directory)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (VICUNA.replace("{{ eos_token }}", ""), "nothing ends an answer"),
        (LLAMA_30.replace("loop.index0 == 0", "loop.index0 % 2 == 0"), "first user turn after a system turn differs"),
        (MARKED.replace("message['content'] + ", "message['content'] + (' twice' if loop.index == 2 else '') + "), ""),
        ("{% for message in messages %}", "cannot be read"),
    ],
)
def test_templates_that_do_more_than_place_messages(template: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{why}.*--prompt-layout"):
        read_layout(checkpoint(tmp_path, template))


def test_what_ends_an_answer_stops_it() -> None:
    layout = replace(LAYOUTS["llama3"], end="<|reserved_special_token_1|>\n")
    tokens = Tokens(tiny_tokenizer(), layout=layout)
    assert tiny_tokenizer().token_to_id("<|reserved_special_token_1|>") in tokens.stop


def test_a_message_cannot_write_control_tokens(tmp_path: Path) -> None:
    tokens = Tokens(tiny_tokenizer(), layout=LAYOUTS["vicuna"])
    row = render([Message("user", "{images}<|eot_id|>{text}")], [], tokens, ProjectorConfig("mlp"), generate=True)
    assert tokens.eot not in row.ids
    assert "{images}<|eot_id|>{text} ASSISTANT:" in tokens.decode(row.ids)


def test_slices_in_reading_order() -> None:
    """Rows are parted by a new line, pictures are numbered, and visual tokens come in the order of the slices."""
    tokens = Tokens(tiny_tokenizer(), layout=LAYOUTS["minicpm"])
    layout = SliceLayout((1, 2), rows=2, cols=2, tile=(1, 1))
    row = render([Message("user", "?", (0,))], [layout], tokens, ProjectorConfig("mlp"), generate=True)
    visual = row.source[row.source >= 9]
    assert visual.tolist() == [*range(9, 9 + 6)]
    text = tokens.decode(row.ids[row.source == 0], special=True)
    one = "<image></image>"
    assert f"{one}<slice>{one * 2}\n{one * 2}</slice>\n?" in text
    numbered = Tokens(tiny_tokenizer(), layout=LAYOUTS["mantis"])
    pictures = [SliceLayout((1, 2)), SliceLayout((1, 1))]
    row = render([Message("user", "?", (0, 1))], pictures, numbered, ProjectorConfig("mlp"), generate=True)
    text = numbered.decode(row.ids[row.source == 0], special=True)
    assert "(image 1: <Image></Image>)(image 2: <Image></Image>)?" in text


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "llama3v"])
def test_every_layout_trains_answers_and_their_end_only(name: str) -> None:
    tokens = Tokens(tiny_tokenizer(), layout=LAYOUTS[name])
    turns = [Message("user", "a", (0,)), Message("assistant", "yes"), Message("user", "b"), Message("assistant", "no")]
    row = render(turns, [SliceLayout((2, 2))], tokens, ProjectorConfig("mlp"))
    trained = tokens.decode(row.ids[row.supervised], special=True)
    layout = LAYOUTS[name]
    assert trained == "".join(layout.answer.replace("{text}", word) + layout.end for word in ("yes", "no"))
    # asked anew after each answer, the row is the same up to there
    asked = render(turns[:3], [SliceLayout((2, 2))], tokens, ProjectorConfig("mlp"), generate=True)
    assert np.array_equal(asked.ids, row.ids[: len(asked)])

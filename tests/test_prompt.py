"""The joint sequence of DESIGN 6, spelled out: ids, where each vector comes from, and what is trained."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest

from mlx_llama3v.config import MARKERS, ProjectorConfig, SliceLayout
from mlx_llama3v.errors import ContextError, DataError
from mlx_llama3v.text.prompt import FIRST_VISUAL, Message, Rendered, describe, render
from mlx_llama3v.text.tokens import Tokens
from tests.hf_llama import llama3_tokenizer, tiny_tokenizer, write_tokenizer
from tests.kit import KIT, needs_kit

PROJECTOR = ProjectorConfig("attention", 12, 32, hidden_dim=16, num_heads=2, pool=3)
SQUARE = SliceLayout((9, 9))  # 9 tokens
SPLIT = SliceLayout((3, 5), rows=2, cols=2, tile=(5, 7))  # 2 + 4 x 6 tokens
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
SIGN = Message("user", "What does the sign say?", (0,))
STOP = Message("assistant", "Stop.")


@pytest.fixture(scope="module", params=["tiny", pytest.param("llama3", marks=needs_kit)])
def tokens(request: pytest.FixtureRequest) -> Tokens:
    return Tokens(tiny_tokenizer() if request.param == "tiny" else llama3_tokenizer(KIT))


def shown(rendered: Rendered, tokens: Tokens) -> str:
    return "".join(text for text, _, _ in describe(rendered, tokens))


def targets(rendered: Rendered, tokens: Tokens) -> list[str]:
    runs = groupby(range(len(rendered)), lambda i: bool(rendered.supervised[i]))
    return [tokens.decode(rendered.ids[list(run)], special=True) for trained, run in runs if trained]


def test_one_picture(tokens: Tokens) -> None:
    row = render([SIGN, STOP], [SQUARE], tokens, PROJECTOR)
    assert shown(row, tokens) == (
        f"<|begin_of_text|>{USER}<image><9 visual tokens></image><text>What does the sign say?</text>"
        f"<|eot_id|>{ASSISTANT}Stop.<|eot_id|>"
    )
    assert targets(row, tokens) == ["Stop.<|eot_id|>"]
    assert row.ids.dtype == row.source.dtype == np.int32 and row.supervised.dtype == np.bool_
    visual = row.source >= FIRST_VISUAL
    assert row.source[visual].tolist() == list(range(9, 18))
    assert set(row.ids[visual]) == {tokens.marker_ids[0]}
    marks = (row.source > 0) & ~visual
    assert [MARKERS[s - 1] for s in row.source[marks]] == ["<image>", "</image>", "<text>", "</text>"]
    assert row.ids[marks].tolist() == [tokens.marker_ids[s - 1] for s in row.source[marks]]


def test_split_picture_in_reading_order(tokens: Tokens) -> None:
    row = render([SIGN, STOP], [SPLIT], tokens, PROJECTOR)
    tile = "<6 visual tokens>"
    assert shown(row, tokens) == (
        f"<|begin_of_text|>{USER}<image><2 visual tokens></image>"
        f"<slices>{tile}<col>{tile}<row>{tile}<col>{tile}</slices>"
        f"<text>What does the sign say?</text><|eot_id|>{ASSISTANT}Stop.<|eot_id|>"
    )
    assert row.source[row.source >= FIRST_VISUAL].tolist() == list(range(9, 9 + 26))


@pytest.mark.parametrize(("rows", "cols", "between"), [(1, 3, "<col><col>"), (3, 1, "<row><row>")])
def test_strips(tokens: Tokens, rows: int, cols: int, between: str) -> None:
    text = shown(render([SIGN, STOP], [SliceLayout((3, 3), rows, cols, (3, 3))], tokens, PROJECTOR), tokens)
    slices = text[text.index("<slices>") + 8 : text.index("</slices>")]
    assert slices.replace("<1 visual tokens>", "") == between


def test_many_turns_many_pictures_and_a_system_prompt(tokens: Tokens) -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "Compare.", (1, 0)),
        Message("assistant", "Same."),
        Message("user", " And now? \n"),
        Message("assistant", "No."),
        Message("user", "This one?", (2,)),
        Message("assistant", "Yes."),
    ]
    row = render(messages, [SQUARE, SliceLayout((3, 3)), SliceLayout((3, 6))], tokens, PROJECTOR)
    assert shown(row, tokens) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        f"{USER}<image><1 visual tokens></image><image><9 visual tokens></image><text>Compare.</text>"
        f"<|eot_id|>{ASSISTANT}Same.<|eot_id|>{USER}And now?<|eot_id|>{ASSISTANT}No.<|eot_id|>"
        f"{USER}<image><2 visual tokens></image><text>This one?</text><|eot_id|>{ASSISTANT}Yes.<|eot_id|>"
    )
    assert targets(row, tokens) == ["Same.<|eot_id|>", "No.<|eot_id|>", "Yes.<|eot_id|>"]
    # Visual tokens count over pictures, not over places: picture 1 stands first and has number 9 of 0..11.
    assert row.source[row.source >= FIRST_VISUAL].tolist() == [18, *range(9, 18), 19, 20]
    assert (row.ids == tokens.bos).sum() == 1


def test_caption_form(tokens: Tokens) -> None:
    messages = [Message("user", "Describe it.", (0,)), Message("assistant", "A red circle.")]
    row = render(messages, [SQUARE], tokens, PROJECTOR, caption=True)
    assert shown(row, tokens) == "<|begin_of_text|><image><9 visual tokens></image>A red circle.<|end_of_text|>"
    assert targets(row, tokens) == ["A red circle.<|end_of_text|>"]
    asked = render(messages[:1], [SQUARE], tokens, PROJECTOR, caption=True, generate=True)
    assert shown(asked, tokens) == "<|begin_of_text|><image><9 visual tokens></image>"


def test_chat_turns_add_up_to_the_whole(tokens: Tokens) -> None:
    """What a session prefills turn by turn is what a fresh prompt, and a training row, would be."""
    later = Message("user", "And this?", (0,))
    first = render([SIGN], [SPLIT], tokens, PROJECTOR, generate=True)
    second = render([later], [SQUARE], tokens, PROJECTOR, generate=True, start=False)
    answer = tokens.encode("Stop.")
    whole = render([SIGN, STOP, Message("user", "And this?", (1,))], [SPLIT, SQUARE], tokens, PROJECTOR, generate=True)
    assert [*first.ids, *answer, *second.ids] == whole.ids.tolist()
    shift = np.where(second.source >= FIRST_VISUAL, 26, 0)
    assert [*first.source, *[0] * len(answer), *(second.source + shift)] == whole.source.tolist()
    trained = render([SIGN, STOP], [SPLIT], tokens, PROJECTOR)
    assert trained.ids[: len(first)].tolist() == first.ids.tolist()
    assert not first.supervised.any()


@pytest.mark.parametrize("attack", ["<|eot_id|>", "<image>", "</text>", "<|begin_of_text|>", "<|start_header_id|>"])
def test_text_cannot_inject(tokens: Tokens, attack: str) -> None:
    messages = [Message("user", f"{attack} x {attack}", (0,)), Message("assistant", f"{attack}.")]
    row = render(messages, [SQUARE], tokens, PROJECTOR)
    calm = render([Message("user", "x", (0,)), Message("assistant", ".")], [SQUARE], tokens, PROJECTOR)
    control = {*tokens.marker_ids, *tokens.stop, *tokens.header("user")[:1], tokens.bos}
    assert [i for i in row.ids if i in control] == [i for i in calm.ids if i in control]
    assert shown(row, tokens) == shown(calm, tokens).replace(">x<", f">{attack} x {attack}<").replace(
        "\n\n.<", f"\n\n{attack}.<"
    )


def test_text_only_equals_the_chat_template(tokens: Tokens, tmp_path) -> None:
    from transformers import AutoTokenizer

    turns = [("system", "Be brief."), ("user", " Hello, you!\n"), ("assistant", "Hi."), ("user", "\nBye\n\n")]
    write_tokenizer(tmp_path, tokens._tokenizer)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    row = render([Message(role, text) for role, text in turns], [], tokens, PROJECTOR, generate=True)
    assert row.ids.tolist() == list(expected)
    assert not row.source.any()


def test_describe_names_every_kind(tokens: Tokens) -> None:
    kinds = [kind for _, kind, _ in describe(render([SIGN, STOP], [SQUARE], tokens, PROJECTOR), tokens)]
    assert kinds == ["prompt", "marker", "visual", "marker", "prompt", "marker", "prompt", "target"]


@pytest.mark.parametrize(
    ("messages", "layouts", "error", "match"),
    [
        ([], [], DataError, "no message"),
        ([SIGN, STOP], [], ContextError, "message 1 brings picture 1, but there are 0"),
        ([Message("user", "x"), STOP], [SQUARE], ContextError, "no message brings picture 1"),
        ([SIGN, STOP], [SliceLayout((0, 4))], ContextError, "picture 1 has no visual tokens"),
        ([SIGN, STOP], [SliceLayout((3, 3), 1, 2, (0, 2))], ContextError, "picture 1 has no visual tokens"),
        ([SIGN, Message("assistant", " ")], [SQUARE], DataError, r"message 2 \(assistant\) is empty"),
        ([Message("user", "\n"), STOP], [], DataError, r"message 1 \(user\) is empty"),
        ([SIGN], [SQUARE], DataError, "no answer to train on"),
        ([Message("bot", "x")], [], DataError, "role 'bot'"),
        ([SIGN, Message("assistant", "x", (0,))], [SQUARE], DataError, "only user turns"),
    ],
)
def test_bad_rows(tokens: Tokens, messages, layouts, error, match: str) -> None:
    with pytest.raises(error, match=match):
        render(messages, layouts, tokens, PROJECTOR)


def test_bad_questions(tokens: Tokens) -> None:
    with pytest.raises(ContextError, match="last message is from assistant"):
        render([SIGN, STOP], [SQUARE], tokens, PROJECTOR, generate=True)
    with pytest.raises(DataError, match="2 answers"):
        render([SIGN, STOP, STOP], [SQUARE], tokens, PROJECTOR, caption=True)


def test_a_picture_without_words_is_a_turn(tokens: Tokens) -> None:
    row = render([Message("user", "", (0,))], [SQUARE], tokens, PROJECTOR, generate=True)
    assert "</image><text></text><|eot_id|>" in shown(row, tokens)

"""Control tokens come from code only; streaming gives the same text as decoding at once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from mlx_llama3v.config import MARKERS
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.text.tokens import Tokens, load_tokenizer, reserved_marker_ids
from tests.hf_llama import byte_bpe, llama3_tokenizer, special_names, tiny_tokenizer, write_tokenizer
from tests.kit import KIT, needs_kit

CONTROL = [*special_names(), *MARKERS]


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(tiny_tokenizer())


@pytest.fixture(scope="module")
def llama3() -> Tokens:
    return Tokens(llama3_tokenizer(KIT))


def special_ids(tokens: Tokens) -> set[int]:
    return {i for i in range(tokens.size) if not tokens.decode([i]) and tokens.decode([i], special=True)}


@pytest.mark.parametrize("name", CONTROL)
def test_a_typed_control_token_stays_text(tokens: Tokens, name: str) -> None:
    ids = tokens.encode(f"a{name}b")
    assert not special_ids(tokens) & set(ids)
    assert tokens.decode(ids) == f"a{name}b"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*CONTROL, "<|", "|>", "é", "猫", "🙂", " ", "\n\n", "x"]), max_size=8).map("".join))
def test_any_text_comes_back_and_holds_no_control_id(text: str) -> None:
    tokens = Tokens(tiny_tokenizer())
    ids = tokens.encode(text)
    assert all(i < 300 for i in ids)  # the tiny tokenizer's specials start at 300
    assert tokens.decode(ids) == text
    stream = tokens.detokenizer()
    pieces = [stream.add(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_held_back_until_the_end(tokens: Tokens) -> None:
    ids = tokens.encode("🙂")
    stream = tokens.detokenizer()
    assert len(ids) > 1 and [stream.add(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == tokens.decode(ids[:-1]) != ""
    assert stream.finish() == ""


def test_markers_take_the_top_of_the_reserved_range_by_id(tokens: Tokens) -> None:
    assert tokens.marker_ids == reserved_marker_ids(tiny_tokenizer()) == tuple(range(313, 321))
    # Llama 3.1 spells a lower id with a higher reserved number: names do not decide.
    renamed = byte_bpe({}, [])
    names = [f"<|reserved_special_token_{n}|>" for n in (9, 8, 7, 6, 5, 4, 3, 2, 1)]
    renamed.add_special_tokens([AddedToken(name, normalized=False) for name in [*names, "<|python_tag|>"]])
    assert reserved_marker_ids(renamed) == (1, 2, 3, 4, 5, 6, 7, 8)


def test_stop_holds_both_ends_and_the_files_own(tokens: Tokens) -> None:
    assert tokens.stop == {tokens.eot, tokens.end_of_text}
    assert Tokens(tiny_tokenizer(), eos_token_ids=[308]).stop == {tokens.eot, tokens.end_of_text, 308}


def test_errors_name_what_is_missing(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokens.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        Tokens.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"no <\|begin_of_text\|>.*<\|eot_id\|>"):
        Tokens(byte_bpe({}, []))
    few = byte_bpe({}, [])
    few.add_special_tokens([AddedToken(name, normalized=False) for name in special_names(reserved=7)])
    with pytest.raises(CheckpointError, match=r"has 7 .* at least 8"):
        reserved_marker_ids(few)
    with pytest.raises(CheckpointError, match="expected 8 different"):
        Tokens(tiny_tokenizer(), marker_ids=[313] * 8)
    with pytest.raises(CheckpointError, match="no token 9999"):
        Tokens(tiny_tokenizer(), marker_ids=range(9999, 10007))


def test_a_file_that_lists_control_tokens_as_text_is_refused(tmp_path) -> None:
    write_tokenizer(tmp_path, tiny_tokenizer())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    next(t for t in content["added_tokens"] if t["content"] == "<|eot_id|>")["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"<\|eot_id\|>' as ordinary text"):
        Tokens(load_tokenizer(tmp_path))


@needs_kit
def test_llama3(llama3: Tokens) -> None:
    assert (llama3.bos, llama3.end_of_text, llama3.eot) == (128000, 128001, 128009)
    assert llama3.marker_ids == tuple(range(128248, 128256))
    assert llama3.header("assistant") == [128006, 78191, 128007, 271]
    assert llama3.encode("<image>\n") == [27, 1843, 397]  # as checkpoints.md b.1 has it
    assert max(llama3.encode("".join(CONTROL))) < 128000
    assert llama3.decode(llama3.encode("a , b ' s")) == "a , b ' s"  # no clean-up of spaces

"""Rows are checked without being laid out, and what is too long is left out, cut or refused, never within a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_llama3v.data.records import Record
from mlx_llama3v.data.rows import RowLayout, Rows, build_rows, usual
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import ContextError, DataError
from mlx_llama3v.layout import LAYOUTS
from mlx_llama3v.text.prompt import FIRST_VISUAL, Message, check_messages
from mlx_llama3v.text.tokens import Tokens
from tests.hf_llama import tiny_tokenizer
from tests.tiny_model import tiny_config, tiny_tokens
from tests.tiny_run import captions, chats, make_store

PROJECTOR = tiny_config().projector_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


def layout(store: Store, most: int, long_rows: str = "drop", stage: str = "sft") -> RowLayout:
    return RowLayout(store, tiny_tokens(), PROJECTOR, stage, most, long_rows)


def two_pictures() -> Record:
    """An answer before the second picture and one after it."""
    return Record(
        "two",
        ("0.png", "3.png"),
        (
            Message("user", "First?", (0,)),
            Message("assistant", "a red one"),
            Message("user", "Second?", (1,)),
            Message("assistant", "a green one, and much more to say of it"),
        ),
    )


def test_bounds_hold_in_every_layout(store: Store) -> None:
    records = [
        *chats(12),
        *captions(6),
        two_pictures(),
        Record("é", (), (Message("user", "é€😀"), Message("assistant", "ü"))),
    ]
    for name in LAYOUTS:
        tokens = Tokens(tiny_tokenizer(), layout=LAYOUTS[name])
        for stage in ("pretrain", "sft"):
            rows, problems = build_rows(records, RowLayout(store, tokens, PROJECTOR, stage, 2000))
            assert not problems and len(rows) == len(records)
            assert all(len(row) <= bound for row, bound in zip(rows, rows.bounds, strict=True)), name


def test_rows_that_surely_fit_are_not_laid_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    tokens = tiny_tokens()
    monkeypatch.setattr(Tokens, "encode", lambda self, text: encoded.append(text) or [1])
    rows, _ = build_rows(chats(20), RowLayout(store, tokens, PROJECTOR, "sft", 2000))
    assert len(rows) == 20 and not encoded
    assert rows[3].id == "row-3" and encoded
    assert isinstance(rows[2:5], Rows) and [row.id for row in rows[2:5]] == ["row-2", "row-3", "row-4"]


@pytest.mark.parametrize("most", range(20, 140, 7))
def test_a_cut_row_ends_with_a_target_and_has_whole_pictures(most: int, store: Store) -> None:
    record = two_pictures()
    whole = layout(store, 1000).whole(record)
    rows, problems = build_rows([record], layout(store, most, "truncate-text"))
    first = int(np.flatnonzero(whole.rendered.supervised)[0])
    if most <= first:
        assert not len(rows) and "its first answer begins after the longest allowed" in problems[0].reason
        return
    (row,) = rows
    assert not problems and len(row) <= most and row.rendered.supervised[-1]
    assert row.rendered.ids.tolist() == whole.rendered.ids[: len(row)].tolist()
    picture = whole.rendered.source >= FIRST_VISUAL
    second = np.flatnonzero(np.diff(picture.astype(int)) == 1)[1] + 1
    kept = int((row.rendered.source >= FIRST_VISUAL).sum())
    assert kept in (int(picture[:second].sum()), int(picture.sum()))
    if len(row) < len(whole):
        assert rows.shortened[0].reason == f"it was cut from {len(whole)} tokens to {len(row)}"


def test_long_rows_can_be_an_error_that_names_them(store: Store) -> None:
    with pytest.raises(DataError, match=r"13 of 13 rows have more than 30 tokens: row-0, .*row-9 and 3 more"):
        build_rows(chats(13), layout(store, 30, "error"))


def test_the_check_finds_what_laying_out_would(store: Store) -> None:
    user, say = Message("user", "What?", (0,)), Message("assistant", "it")
    broken: dict[str, Any] = {
        "gone": (("no.png",), (user, say)),
        "mute": (("0.png",), (user, Message("assistant", " "))),
        "spare": (("0.png", "1.png"), (user, say)),
        "short": ((), (user, say)),
        "unanswered": (("0.png",), (user,)),
        "role": (("0.png",), (user, say, Message("tool", "x"))),
        "nothing": ((), ()),
    }
    records = [Record(name, images, messages) for name, (images, messages) in broken.items()]
    rows, problems = build_rows([*records, *chats(2)], layout(store, 1000))
    assert [problem.where for problem in problems] == [f"record {name}" for name in broken] and len(rows) == 2
    laid_out = []
    for record in records:
        with pytest.raises((DataError, ContextError)) as error:
            layout(store, 1000).whole(record)
        laid_out.append(str(error.value).rstrip("."))
    assert [problem.reason for problem in problems] == laid_out


_TURN = st.builds(
    Message,
    st.sampled_from(["user", "assistant", "assistant", "system", "tool"]),
    st.sampled_from(["", " ", "a"]),
    st.sampled_from([(), (0,), (1,), (0, 1)]),
)


@given(messages=st.lists(_TURN, max_size=4), pictures=st.integers(0, 2))
def test_what_is_usual_passes_the_whole_check(messages: list[Message], pictures: int) -> None:
    if usual(messages, pictures):
        caption = Record("1", ("a.jpg",) * pictures, tuple(messages)).caption
        check_messages(messages, pictures, generate=False, caption=caption)


def test_ordinary_rows_are_usual() -> None:
    say = Message("assistant", "A cat.")
    for asked in ("", "What?"):
        assert usual([Message("user", asked, (0,)), say], 1)
    assert usual([Message("user", "Why?"), say, Message("user", "And?"), say], 0)
    assert not usual([Message("user", ""), say], 0)
    assert not usual([Message("user", "What?", (0,)), say, Message("user", "And?", (0,)), say], 1)
    assert not usual([Message("user", "What?", (0,))], 1)

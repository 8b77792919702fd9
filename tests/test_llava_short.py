"""Reading training files the short way: every row as the long one reads it, all JSON as `json` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_llama3v.data.llava import _converted, _record, read_records, read_row
from mlx_llama3v.data.records import Problem, Record

_JSON = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just(["a.jpg"]))


@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(["human", "gpt", "system", "user"]),
            st.lists(st.sampled_from(["<image>", "\n", "a <b>", " ", "é", "\ud800", "<IMG_CONTEXT>"]), max_size=4),
        ),
        min_size=1,
        max_size=3,
    ),
    image=st.sampled_from([None, "a.jpg", "", ["a.jpg"]]),
    name=st.sampled_from([None, 3, "x"]),
)
def test_the_short_way_reads_as_the_long_one(turns: Any, image: Any, name: Any) -> None:
    row = {"id": name, "image": image, "conversations": [{"from": who, "value": "".join(t)} for who, t in turns]}
    found = _converted(row, 7)
    if found is not None:
        assert found == _record(row, 7)


def test_ordinary_rows_go_the_short_way() -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    bare = [{"from": "human", "value": "Why?"}, *talk[1:]]
    assert _converted({"id": "1", "image": "a.jpg", "conversations": talk + bare}, 1) is not None
    assert _converted({"image": "a.jpg", "conversations": [{**talk[0], "value": "Ü?\n<image>"}]}, 1) is not None
    assert _converted({"conversations": bare}, 1) is not None
    assert _converted({"id": "1", "image": "a.jpg", "conversations": talk + talk}, 1) is None


@given(
    turns=st.lists(st.tuples(st.sampled_from(["human", "gpt", 3]), st.text(max_size=5)), max_size=3),
    lead=st.sampled_from(["<image>\n", "\ud83d", ""]),
    beside=st.dictionaries(st.sampled_from(["id", "image", "images", "system_prompt", "model"]), _JSON, max_size=3),
    ascii_only=st.booleans(),
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_reads_as_its_values(
    tmp_path_factory: Any, turns: Any, lead: str, beside: Any, ascii_only: bool, ending: str
) -> None:
    talk = [{"from": who, "value": lead + text} for who, text in turns]
    rows = [{**beside, "conversations": talk}, {"conversations": talk}]
    spelled = [json.dumps(row, ensure_ascii=ascii_only or lead == "\ud83d") for row in rows]
    file = tmp_path_factory.mktemp("rows") / f"rows.{ending}"
    file.write_bytes(("\n".join(spelled) if ending == "jsonl" else f"[{','.join(spelled)}]").encode("utf-8", "replace"))
    read = read_records(file)
    kind = "line" if ending == "jsonl" else "record"
    expected = [read_row(json.loads(row), n, f"{file.name}: {kind} {n}") for n, row in enumerate(spelled, 1)]
    assert read.records == tuple(row for row in expected if isinstance(row, Record))
    assert read.problems == tuple(row for row in expected if isinstance(row, Problem))


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ('{"id": 1.0, "x": NaN, %s}', "1.0"),
        ('{"id": 123456789012345678901, %s}', "123456789012345678901"),
        ('{"id": 1e999, %s}', "inf"),
        ('{"id": true, %s}', "True"),
        ('{"id": "a", "id": "b", %s}', "b"),
        ('{"x": "\\ud83d", %s}', "2"),
        ('"{}"', None),
        ('"{\\"conversations\\": [{\\"from\\": \\"gpt\\", \\"value\\": \\"A\\"}]}"', None),
        ("null", None),
    ],
)
def test_json_that_parsers_differ_on(tmp_path: Path, row: str, kept: str | None) -> None:
    talk = '"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]'
    row = row.replace("%s", talk)
    (tmp_path / "a.json").write_text(f"[{{{talk}}}, {row}]")
    (tmp_path / "a.jsonl").write_text(f"{{{talk}}}\n{row}\n")
    for name in ("a.json", "a.jsonl"):
        read = read_records(tmp_path / name)
        assert [record.id for record in read.records] == (["1"] if kept is None else ["1", kept])
        assert len(read.problems) == (kept is None)

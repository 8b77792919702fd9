"""Reading training files: every dialect of the kit, and every way in which rows and files are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama3v.data.llava import image_paths, read_records
from mlx_llama3v.data.records import Record, RecordFile
from mlx_llama3v.data.sources import Refused
from mlx_llama3v.errors import DataError
from mlx_llama3v.text.prompt import Message
from tests.kit import KIT, needs_kit

TRAINING = json.loads((KIT / "MANIFEST.json").read_text())["training_data_check"] if KIT.is_dir() else []


def read(path: Path, rows: Any) -> RecordFile:
    path.write_text(json.dumps(rows), "utf-8")
    return read_records(path)


def one(tmp_path: Path, row: dict[str, Any]) -> Record:
    file = read(tmp_path / "one.json", [row])
    assert not file.problems, file.problems
    return file.records[0]


def refused(tmp_path: Path, row: Any) -> str:
    file = read(tmp_path / "one.json", [row])
    assert not file.records and file.problems[0].where == "one.json: record 1"
    return file.problems[0].reason


def llava(*turns: str, **keys: Any) -> dict[str, Any]:
    """A LLaVA row: human and gpt in turn."""
    roles = ["human", "gpt"]
    return {**keys, "conversations": [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)]}


@needs_kit
@pytest.mark.parametrize("check", TRAINING, ids=lambda check: Path(check["file"]).name)
def test_every_training_file_of_the_kit(check: dict[str, Any]) -> None:
    file = read_records(KIT / check["file"])
    assert not file.problems
    assert len(file.records) == check["records"]
    assert sum(bool(record.images) for record in file.records) == check["with image"]
    assert sum(len(record.images) for record in file.records) == check["images"]
    root = KIT / check["image_root"].split(" ")[0]
    paths = image_paths(file, root)
    missing = {name for name, path in paths.items() if not path.is_file()}
    assert missing >= set(check.get("missing", ())) and bool(missing) is ("missing" in check)
    for record in file.records:
        brought = [index for message in record.messages for index in message.images]
        assert sorted(brought) == list(range(len(record.images)))
        for message in record.messages:
            assert message.text.strip() or message.images
            assert "<image>" not in message.text and "<IMG_CONTEXT>" not in message.text


@needs_kit
def test_every_file_of_the_kit_is_read_or_refused_by_name() -> None:
    for path in sorted(KIT.rglob("*.json*")):
        try:
            file = read_records(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert file.records or file.problems


@needs_kit
def test_pictures_stay_in_their_turns() -> None:
    sharegpt = read_records(KIT / "llava/LLaMA-Factory/mllm_demo.json").records[0]
    assert sharegpt.images == ("mllm_demo_data/1.jpg",) * 2
    assert sharegpt.messages == (
        Message("user", "Who are they?", (0,)),
        Message("assistant", "They're Kane and Gretzka from Bayern Munich."),
        Message("user", "What are they doing?", (1,)),
        Message("assistant", "They are celebrating on the soccer field."),
    )
    parts = read_records(KIT / "llava/LLaMA-Factory/v1_multimodal_demo.jsonl").records[0]
    assert parts.images == ("data/mllm_demo_data/1.jpg",) * 2 and parts.messages == sharegpt.messages


@needs_kit
def test_pretrain_turns_become_captions() -> None:
    file = read_records(KIT / "llava/xtuner/resource/mllm_pretrain_image_example_data.jsonl")
    assert all(record.caption for record in file.records)
    assert file.records[0].messages == (
        Message("user", "", (0, 1)),
        Message("assistant", "图片中的狗是什么颜色？\n图中有几只猫"),
    )


@needs_kit
@pytest.mark.parametrize("name", ["lmms-finetune/video.json", "LLaMA-Factory/mllm_video_demo.json"])
def test_videos_are_refused(name: str) -> None:
    file = read_records(KIT / "llava" / name)
    assert not file.records and file.problems
    assert {problem.reason for problem in file.problems} == {"it has a video; only pictures are supported"}


@needs_kit
def test_a_truncated_file_is_an_error_with_its_position() -> None:
    path = KIT / "eval/scienceqa/problems_truncated.json"
    with pytest.raises(DataError, match=rf"{path} is not JSON \(.*line 34949 column 5"):
        read_records(path)


def test_system_prompt_and_several_pictures(tmp_path: Path) -> None:
    row = llava("<image><image>Which?", "The first.", image=["a.png", "b.png"], system_prompt="Be brief.", id=7)
    assert one(tmp_path, row) == Record(
        "7",
        ("a.png", "b.png"),
        (
            Message("system", "Be brief."),
            Message("user", "Which?", (0, 1)),
            Message("assistant", "The first."),
        ),
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("What?<image>", "What?"),
        ("Look at <image> here", "Look at here"),
        ("One<image>two", "One two"),
        ("One <image>\nTwo", "One\nTwo"),
        ("  spaced  <IMG_CONTEXT>", "spaced"),
    ],
)
def test_a_placeholder_leaves_its_words_apart(tmp_path: Path, given: str, text: str) -> None:
    assert one(tmp_path, llava(given, "a", image="a.png")).messages[0] == Message("user", text, (0,))


def test_text_without_placeholders_is_left_alone(tmp_path: Path) -> None:
    text = "  two  spaces\n\n\nand <b>tags</b> "
    assert one(tmp_path, llava(text, "a")).messages[0].text == text


def test_placeholders_take_pictures_in_order_and_the_rest_goes_first(tmp_path: Path) -> None:
    row = llava("hi <image>", "hello", "this: <image>", "a", "and", "b", images=["1", "2", "3", "4"])
    brought = [message.images for message in one(tmp_path, row).messages]
    assert brought == [(0, 2, 3), (), (1,), (), (), ()]


def test_what_a_model_says_is_never_a_placeholder(tmp_path: Path) -> None:
    record = one(tmp_path, llava("Which tag?", "Write <image>.", image="a.png"))
    assert record.messages == (Message("user", "Which tag?", (0,)), Message("assistant", "Write <image>."))


def test_parts_and_listed_pictures_in_one_row(tmp_path: Path) -> None:
    content = [
        {"type": "image", "image": {"path": "own.png"}},
        {"type": "text", "text": "<image><image>both?"},
    ]
    row = {"messages": [{"role": "user", "content": content}], "images": ["listed.png"]}
    record = one(tmp_path, row)
    assert record.images == ("listed.png", "own.png") and record.messages[0].images == (1, 0)


def test_captions_are_rows_in_which_nothing_is_asked(tmp_path: Path) -> None:
    assert one(tmp_path, llava("<image>", "A cat.", image="a.png")).caption
    assert not one(tmp_path, llava("<image>What?", "A cat.", image="a.png")).caption
    assert not one(tmp_path, llava("<image>", "A cat.", "<image>", "A dog.", images=["a", "b"])).caption
    assert not one(tmp_path, llava("<image>", "A cat.", image="a.png", system_prompt="Rhyme.")).caption
    assert not one(tmp_path, llava(" ", "A cat.")).caption


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (llava("<image><image>", "a", image="a.png"), "more image placeholders than pictures"),
        (llava("<image>", "a"), "more image placeholders than pictures"),
        ({"id": 1, "question": "?"}, "the keys id, question; expected 'conversations' or 'messages'"),
        ([1, 2], r"it is \[1, 2\]"),
        ({"conversations": []}, "not a list of turns"),
        ({"conversations": {"from": "human"}}, "not a list of turns"),
        ({"messages": ["hi"]}, "a turn is 'hi', expected an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"the role \['user'\]"),
        ({"messages": [{"role": "user"}]}, "a text is None"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "the type 'audio'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "the type None"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
            "answer holds a",
        ),
        ({"messages": [{"role": "system", "content": "<image>"}], "images": ["a"]}, "system turn holds a"),
        ({"messages": [{"role": "assistant", "content": "x"}], "images": ["a"]}, "no user turn"),
        (llava("x", "half \ud83d"), "not valid Unicode"),
        (llava("x", "y", image=5), "a picture is given as 5"),
        (llava("x", "y", image=[["a"], {"url": None}]), "a picture is given as None"),
        (llava("x", "y", videos=["a.mp4"]), "it has a video"),
        (llava("x", "y", system_prompt=["a"]), r"a text is \['a'\]"),
    ],
)
def test_a_row_that_cannot_be_used_is_a_problem(tmp_path: Path, row: Any, reason: str) -> None:
    assert re.search(reason, refused(tmp_path, row))
    good = read(tmp_path / "two.json", [row, llava("x", "y")])
    assert (len(good.records), len(good.problems)) == (1, 1)  # and the others are read


def test_a_bad_line_is_a_problem_with_its_number(tmp_path: Path) -> None:
    lines = [
        json.dumps(llava("x", "y")),
        "",
        '{"conversations": [',
        json.dumps(llava("x\u2028z", "y"), ensure_ascii=False),
    ]
    lines += ["9" * 5000, "[" * 100_000, json.dumps(llava("x", "y"))[:-5]]
    for name in ("rows.jsonl", "rows.json"):  # JSON lines are known by their content
        path = tmp_path / name
        path.write_text("\r\n".join(lines), "utf-8")
        file = read_records(path)
        assert [record.id for record in file.records] == ["1", "4"]
        assert [problem.where for problem in file.problems] == [f"{name}: line {n}" for n in (3, 5, 6, 7)]
        assert "column" in file.problems[0].reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'[{"conversations": [}]', r"is not JSON \(.*line 1 column 21"),
        (b'[{"a": "b\xff"}]', r"is not UTF-8 text \(byte 9\)"),
        (b'{"a": 1}', "holds one dict"),
        (b'"text"', "holds one str"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"data\.json {reason}"):
        read_records(path)


def test_other_shapes_of_files(tmp_path: Path) -> None:
    row = llava("x", "y")
    assert len(read(tmp_path / "single.json", row).records) == 1
    assert len(read(tmp_path / "array.jsonl", [row, row]).records) == 2
    (tmp_path / "bom.json").write_text("\ufeff" + json.dumps([row]), "utf-8")
    assert len(read_records(tmp_path / "bom.json").records) == 1
    with pytest.raises(DataError, match=r"absent\.json cannot be read: No such file"):
        read_records(tmp_path / "absent.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["<image>", "human", "user", "x", ""]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["conversations", "messages", "from", "role", "value", "content", "image", "images"])
        | st.sampled_from(["type", "text", "url", "image_url", "id", "system_prompt", "video"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(JSON, max_size=3))
def test_nothing_that_is_json_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    file = read(tmp_path_factory.getbasetemp() / "fuzz.json", rows)
    assert len(file.records) + len(file.problems) == len(rows)


def test_where_pictures_are_looked_up(tmp_path: Path) -> None:
    home, folder = tmp_path / "a" / "b", tmp_path / "pictures"
    for path in (
        folder / "both.png",
        home / "both.png",
        home / "near.png",
        tmp_path / "up.png",
        folder / "x" / "d.png",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = [
        "both.png",
        "near.png",
        "up.png",
        "data/x/d.png",
        "no.png",
        "nul\0",
        str(home / "near.png"),
        "both.png",
    ]
    file = read(home / "rows.json", [llava("x", "y", image=name) for name in names])
    everywhere = {
        "both.png": folder / "both.png",
        "near.png": home / "near.png",
        "up.png": tmp_path / "up.png",
        "data/x/d.png": folder / "x" / "d.png",
        "no.png": folder / "no.png",
        "nul\0": folder / "nul\0",
        str(home / "near.png"): home / "near.png",
    }
    assert image_paths(file, folder, allow_outside=True) == everywhere
    alone = image_paths(file, folder)
    absolute = alone.pop(str(home / "near.png"))
    assert isinstance(absolute, Refused) and "--allow-outside" in absolute.reason
    assert alone["near.png"] == folder / "near.png"  # nowhere: the folder that was given is the only one
    assert {name for name in alone if alone[name] != everywhere[name]} == {"near.png", "up.png"}
    assert image_paths(file)["both.png"] == home / "both.png"


def test_a_picture_in_the_text_is_refused_and_not_its_name(tmp_path: Path) -> None:
    url = "data:image/png;base64," + "A" * 200_000
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    turns = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"},
    ]
    for row in ({"image": url, "conversations": talk}, {"messages": turns}):
        why = refused(tmp_path, row)
        assert why.startswith("a picture is given as its bytes (data:image/png;base64,AAAAAAAA...)") and len(why) < 120
    assert one(tmp_path, {"image": "data/a.png", "conversations": talk}).images == ("data/a.png",)

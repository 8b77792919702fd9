"""Questions from a file, and the file of answers that a later run goes on with."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_llama3v.errors import DataError
from mlx_llama3v.inference import Sampling, load
from mlx_llama3v.inference.jobs import Job, Result, answer_jobs, read_jobs, unanswered, write_results
from tests.serving import make_directory, png
from tests.test_conversation import answer


def test_jobs(tmp_path: Path) -> None:
    session = load(make_directory(tmp_path / "model"))
    (tmp_path / "a.png").write_bytes(png(1))
    lines = [
        '{"id": "x", "prompt": "What?", "image": "a.png"}', "", '{"prompt": "Both?", "images": ["a.png", "a.png"]}',
        '{"prompt": "Broken?", "image": "none.png"}', '{"prompt": "Nothing?"}',
    ]  # fmt: skip
    jobs = read_jobs(lines, "q.jsonl", tmp_path)
    assert [job.id for job in jobs] == ["x", "3", "4", "5"]
    sampling, out, told = Sampling(max_tokens=5), tmp_path / "out.jsonl", []
    with out.open("w") as file:
        assert write_results(answer_jobs(session, jobs, sampling, 2), file, told.append) == (3, 1)
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert "none.png" in rows["4"]["error"] and len(told) == 4
    for job in (jobs[0], jobs[1], jobs[3]):
        session.reset()
        assert rows[job.id]["text"] == answer(session, job.prompt, job.images, max_tokens=5).text
    with out.open("a") as file:
        file.write('{"id": "5x", "pro')
    assert unanswered(jobs, out) == [jobs[2]]  # the failed one is asked again, the half line is gone
    assert len(out.read_text().splitlines()) == 3 and unanswered(jobs, tmp_path / "none") == jobs
    moved = read_jobs(lines[2:], "q.jsonl", tmp_path)  # ids are line numbers where none is given
    with pytest.raises(DataError, match="another question '3'"):
        unanswered(moved, out)
    (tmp_path / "mine.txt").write_text("my thesis\nline two\n")
    with pytest.raises(DataError, match="not overwritten"):
        unanswered(jobs, tmp_path / "mine.txt")
    for line in ('{"prompt": 1}', "[]", "{", '{"prompt": "x", "imge": "y"}', '{"prompt": "x", "images": "y"}'):
        with pytest.raises(DataError, match=r"q.jsonl, line 1"):
            read_jobs([line], "q.jsonl", tmp_path)
    with pytest.raises(DataError, match="more than once"):
        read_jobs(['{"id": 1, "prompt": "x"}'] * 2, "q.jsonl", tmp_path)
    assert list(answer_jobs(session, [], sampling)) == [] and write_results([], io.StringIO(), print) == (0, 0)


RESULT = Result(Job("a", "What?", (Path("a.png"),)), None, "broken")
LINE = RESULT.line()


def test_answers_of_another_model_are_not_taken_for_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, me = tmp_path / "out.jsonl", {"model": "/a", "run": ""}
    monkeypatch.setattr(Result, "line", lambda self: {**LINE, "text": "a cat"})
    with path.open("w") as file:
        write_results([RESULT], file, lambda _: None, me)
    before = path.read_bytes()
    assert unanswered([RESULT.job], path, me) == unanswered([RESULT.job], path) == []
    for other, words in (({**me, "model": "/b"}, "model '/a'"), ({**me, "run": "/r"}, "run ''")):
        with pytest.raises(DataError, match=f"out.jsonl holds answers of {words}; choose another --output"):
            unanswered([RESULT.job], path, other)
    assert path.read_bytes() == before
    with path.open("w") as file:
        write_results([RESULT], file, lambda _: None)
    assert unanswered([RESULT.job], path, me) == [], "an older file says of nobody"


@pytest.mark.parametrize(
    "line",
    [
        {"id": "a", "prompt": "What?"},  # a question
        {"id": "a", "text": "someone's own row"},
        {**LINE, "id": 1},
        {**LINE, "prompt": None},
        {**LINE, "images": "a.png"},
        {**LINE, "images": [1]},
        {**LINE, "error": 5},
        "text",
        ["text"],
        3,
    ],
)
def test_only_a_file_of_answers_is_rewritten(line: object, tmp_path: Path) -> None:
    path, ours = tmp_path / "mine.jsonl", json.dumps(LINE)
    for content in (
        json.dumps(line),
        f"{json.dumps(line)}\n",
        f"{ours}\n{json.dumps(line)}\n",
        f"{json.dumps(line)}\n{ours}",
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=r"mine.jsonl, line \d is no answer of ours; it is not overwritten"):
            unanswered([RESULT.job], path)
        assert path.read_text() == content
    path.write_bytes(b"\xff\xfe\x00 a picture")
    with pytest.raises(DataError, match="not overwritten"):
        unanswered([RESULT.job], path)


def test_answers_without_a_last_newline_are_gone_on_with(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.jsonl", json.dumps({**LINE, "text": "é"}, ensure_ascii=False)
    path.write_text(whole, encoding="utf-8")  # as an editor may leave it
    assert unanswered([RESULT.job], path) == [] and path.read_text(encoding="utf-8") == f"{whole}\n"
    path.write_bytes(f"{whole}\n{whole}".encode()[:-5])  # cut within a character
    assert unanswered([RESULT.job], path) == [] and path.read_text(encoding="utf-8") == f"{whole}\n"


def test_answers_are_found_again_from_another_spelling_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**LINE, "text": "x"}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert unanswered([replace(RESULT.job, images=(tmp_path / "a.png",))], path) == []
    with pytest.raises(DataError, match="another question 'a'"):
        unanswered([replace(RESULT.job, images=(tmp_path / "b.png",))], path)


def test_any_text_survives_as_a_line(tmp_path: Path) -> None:
    odd = "What\u2028shape\x85?", "half \ud83d"
    jobs = read_jobs([json.dumps({"prompt": text}, ensure_ascii=False) for text in odd], "q.jsonl", tmp_path)
    assert [job.prompt for job in jobs] == list(odd)
    session, path = load(make_directory(tmp_path / "model")), tmp_path / "a.jsonl"
    with path.open("w", encoding="utf-8") as file:
        assert write_results(answer_jobs(session, jobs, Sampling(max_tokens=2)), file, lambda _: None) == (1, 1)
    assert [json.loads(line)["prompt"] for line in sorted(path.read_text().split("\n")[:-1])] == list(odd)
    assert unanswered(jobs, path) == jobs[1:] and unanswered(jobs, path) == jobs[1:]


def test_equal_questions_draw_their_own_answers(tmp_path: Path) -> None:
    session = load(make_directory(tmp_path / "model"))
    jobs = read_jobs(['{"prompt": "What?"}'] * 5, "q.jsonl", tmp_path)

    def said(jobs: list[Job], seed: int = 7) -> list[str]:
        return [r.answer.text for r in answer_jobs(session, jobs, Sampling(max_tokens=8, temp=2.0, seed=seed), 2)]

    found = said(jobs)
    assert len(set(found)) == 5 and said(jobs) == found and said(jobs[3:]) == found[3:]  # also where a run goes on
    session.reset()
    assert found[0] == answer(session, "What?", max_tokens=8, temp=2.0, seed=7).text
    assert not set(said(jobs, 8)) & set(found)

"""`generate` from the command line: several pictures, stdin, JSON, files of questions; `serve`'s refusals."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Cli, refused
from tests.serving import make_directory, png


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_directory(tmp_path_factory.mktemp("generate") / "model")
    for n in range(3):
        (path.parent / f"{n}.png").write_bytes(png(n))
    return path


def test_pictures_and_json(cli: Cli, directory: Path) -> None:
    base = ("generate", "--model", directory, "--prompt", "What?", "--max-tokens", 5, "--json")
    images = [word for n in (0, 1) for word in ("--image", directory.parent / f"{n}.png")]
    both = json.loads(cli(*base, *images, "--max-slices", 2).out)
    assert both["slices"] >= 2 and both["visual_tokens"] > 0 and both["timings"]["first_token"] > 0
    assert (both["finish_reason"], len(both["tokens"])) == ("length", 5)
    one = json.loads(cli(*base, *images[:2]).out)
    assert one["prompt_tokens"] < both["prompt_tokens"] or one["slices"] != both["slices"]

    assert json.loads(cli(*base, "--image", "-", stdin=png(0)).out)["text"] == one["text"]


def test_a_file_of_questions_goes_on(cli: Cli, directory: Path, tmp_path: Path) -> None:
    questions, answers = directory.parent / "q.jsonl", tmp_path / "a.jsonl"
    rows = [{"prompt": f"{n}?", "image": f"{n % 3}.png"} for n in range(5)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ("generate", "--model", directory, "--prompts", questions, "--max-tokens", 4, "--batch-size", 2)
    first = cli(*base, "--output", answers)
    assert first.status == 0 and "5 answered, 0 failed" in first.out and str(answers) in first.out
    whole = answers.read_text()
    answers.write_text("".join(line + "\n" for line in whole.splitlines()[:2]) + whole.splitlines()[2][:30])
    again = cli(*base, "--output", answers)
    assert "3 answered, 0 failed, 2 were there" in again.out and answers.read_text() == whole
    piped = cli(*base)  # stdout holds nothing but answers
    assert piped.out == whole and "5 answered" in piped.err
    stdin = cli("generate", "--model", directory, "--prompts", "-", "--max-tokens", 4, stdin='{"prompt": "Hi"}\n')
    assert json.loads(stdin.out)["id"] == "1"
    questions.write_text(json.dumps({"prompt": "x", "image": "none.png"}) + "\n")
    broken = cli(*base)
    assert broken.status == 1 and "none.png" in json.loads(broken.out)["error"] and "1 failed" in broken.err


def test_questions_are_not_answered_into_their_own_file(cli: Cli, directory: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(content := '{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "y", "image": "0.png"}\n')
    (tmp_path / "link").symlink_to(questions)
    (tmp_path / "copy.jsonl").write_text(content)
    base = ("generate", "--model", directory, "--prompts", questions, "--output")
    for same in (questions, tmp_path / "." / "q.jsonl", tmp_path / "link"):
        refused(cli(*base, same), "holds the questions", "--output")
    refused(cli(*base, tmp_path / "copy.jsonl"), "copy.jsonl, line 1", "not overwritten")
    assert questions.read_text() == (tmp_path / "copy.jsonl").read_text() == content


def test_lines_of_questions_end_at_newlines_alone(cli: Cli, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "What\u2028shape\u0085?"}\r\n', encoding="utf-8")
    found = cli("generate", "--model", directory, "--prompts", tmp_path / "q.jsonl", "--max-tokens", 2)
    assert found.status == 0 and json.loads(found.out)["prompt"] == "What\u2028shape\u0085?", found.err


def test_bytes_that_are_no_text(cli: Cli, directory: Path) -> None:
    base, odd = ("generate", "--model", directory, "--max-tokens", 2), b'{"prompt": "a \xff?"}\n{"prompt": "b?"}\n'
    refused(cli(*base, "--prompt", "-", stdin=odd), "not valid UTF-8")
    asked = cli(*base, "--prompts", "-", stdin=odd)
    assert "not valid UTF-8" in asked.err and "1 answered, 1 failed" in asked.err and "Traceback" not in asked.err
    talk = cli("chat", "--model", directory, "--max-tokens", 2, stdin=b"a \xff?\nWhat?\n/save \xff/none.md\n")
    assert talk.status == 0 and talk.out and "not valid UTF-8" in talk.err and "none.md cannot be written" in talk.err


def test_mistakes(cli: Cli, directory: Path, tmp_path: Path) -> None:
    base = ("generate", "--model", directory)
    refused(cli(*base), "--prompt", "--prompts")
    refused(cli(*base, "--prompt", "x", "--prompts", "y"), "either")
    refused(cli(*base, "--prompt", "-", "--image", "-"), "stdin")
    refused(cli(*base, "--prompts", tmp_path / "none.jsonl"), "none.jsonl")
    refused(cli(*base, "--prompts", "-", "--image", "x.png"), "--image")
    refused(cli(*base, "--prompt", "x", "--kv-bits", 5), "kv_bits")
    refused(cli(*base, "--prompt", "x " * 100, "--max-kv-size", 50), "context holds 50")
    refused(cli(*base, "--prompt", "x", "--top-p", 0), "top_p")


def test_serve_refuses(cli: Cli, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ("serve", "--model", directory)
    refused(cli(*base, "--max-batch", 0), "max_batch")
    refused(cli(*base, "--image-dir", tmp_path / "none"), "none")
    refused(cli("serve", "--model", tmp_path / "none", "--port", 0), "none")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(cli(*base), "mlx-llama3v[serve]")


def test_serve_takes_its_port_before_the_model_is_loaded(cli: Cli, directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            taken = cli("serve", "--model", tmp_path / "none", "--host", host, "--port", port)
            refused(taken, f"port {port} is in use; choose another with --port.")
            assert not taken.out
    refused(cli("serve", "--model", directory, "--host", "192.0.2.1"), "192.0.2.1 port 8080", "--host")
    refused(cli("serve", "--model", directory, "--host", "no such name"), "no such name", "--host")


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("::1", "[::1]")])
def test_serve_says_where_it_is(
    host: str,
    shown: str,
    cli: Cli,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uvicorn, found = pytest.importorskip("uvicorn"), []

    def run(server: Any, sockets: list[socket.socket]) -> None:
        server.started = True
        found.extend(made.getsockname()[1] for made in sockets)
        for made in sockets:
            socket.create_connection(made.getsockname()[:2], timeout=5).close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    done = cli("serve", "--model", directory, "--host", host, "--port", 0)
    if host == "::1" and "Cannot assign" in done.err:
        pytest.skip("no IPv6 here")
    assert done.status == 0 and len(set(found)) == 1 and found[0] > 0, done
    assert f"page http://{shown}:{found[0]}/, API http://{shown}:{found[0]}/v1" in done.out

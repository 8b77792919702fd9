"""`chat` as a person meets it: every command from a pipe, and streaming, history and Ctrl-C on a pseudo terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_llama3v.cli import show
from mlx_llama3v.cli.chat import Conversation
from mlx_llama3v.cli.dropped import take_dropped
from mlx_llama3v.cli.transcript import Exchange, from_markdown, to_markdown
from mlx_llama3v.errors import DataError, UserError
from mlx_llama3v.inference import Piece, Sampling, load
from tests.command_line import Cli
from tests.serving import ENDLESS_CLI, make_directory, png

pty = pytest.importorskip("pty")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_directory(tmp_path_factory.mktemp("chat") / "model", context=100_000)
    (path.parent / "my picture.png").write_bytes(png(1))
    return path


@pytest.fixture
def chat(directory: Path) -> Conversation:
    return Conversation(load(directory), Sampling(max_tokens=6))


def test_every_command(chat: Conversation, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(line: str) -> str:
        capsys.readouterr()
        chat.take(line)
        return capsys.readouterr().out

    picture = directory.parent / "my picture.png"
    assert "/retry" in said("/help") and "no picture" in said("/images") and "no answer" in said("/stats")
    for line in (
        "/retry",
        "/edit x",
        "/save",
        "/load",
        f"/load {picture}",
        "/image none.png",
        "/image ~nobody/x",
        "/nothing",
    ):
        with pytest.raises(UserError):
            chat.take(line)
    assert "next question" in said(f"'{picture}'") and "next question" in said("/images")
    assert said("What is it?")
    assert "question 1" in said("/images") and "visual tokens" in said("/stats")
    second = said("And now?")
    assert said("/retry") == second and said("/edit What then?") != ""
    assert [turn.text for turn in chat.session.turns] == ["What is it?", "What then?"]
    saved = tmp_path / "talk.md"
    assert "2 turns" in said(f"/save {saved}")
    answers = chat.session.answers()
    with pytest.raises(UserError, match="context holds"):
        chat.take("/edit " + "long " * 60_000)
    assert chat.session.answers() == answers and len(chat.asked) == 2  # a failed edit changes nothing
    assert "forgotten" in said("/reset") and chat.session.ids == []
    assert "2 turns" in said(f"/load {saved}")
    assert [turn.text for turn in chat.session.turns] == ["What is it?", "What then?"]
    assert [a.strip() for a in chat.session.answers()] == [a.strip() for a in answers]
    assert said("More?") and len(chat.asked) == 3
    assert "anew" in said("/system Be brief.") and chat.session.system == "Be brief."
    chat.take("/image " + str(picture))
    assert said("What is it?") and "Be brief." in chat.session.tokens.decode(chat.session.ids)
    assert said("") == "" and said("x" * 5000)  # longer than a file name may be


@pytest.mark.parametrize(
    ("line", "names", "question"),
    [
        ("{0}/a.png", ["a.png"], ""),
        (r"{0}/b\ \(1\).png ", ["b (1).png"], ""),  # as a Mac's terminal types a dropped file
        ("'{0}/b (1).png' ", ["b (1).png"], ""),  # as GNOME's does
        (r"'{0}/it'\''s.png'", ["it's.png"], ""),
        ("file://{0}/b%20(1).png", ["b (1).png"], ""),
        ("{0}/b (1).png", ["b (1).png"], ""),
        (r"{0}/a.png '{0}/b (1).png' What's  \new?", ["a.png", "b (1).png"], r"What's  \new?"),
        ("{0}/Shot\\ at\\ 3.45\u202fPM.png What?", ["Shot at 3.45\u202fPM.png"], "What?"),  # a Mac's screenshot
        ("'{0}/Shot at 3.45\u202fPM.png'", ["Shot at 3.45\u202fPM.png"], ""),
        ("a.png What?", [], "a.png What?"),  # a question that begins like a file here
        ("What's in {0}/a.png?", [], "What's in {0}/a.png?"),
        ("'", [], "'"),
        ("~nobody/x", [], "~nobody/x"),
    ],
)
def test_dropped_files(
    line: str, names: list[str], question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b (1).png", "it's.png", "Shot at 3.45\u202fPM.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    paths, rest = take_dropped(line.replace("{0}", str(tmp_path)))
    assert (paths, rest) == ([tmp_path / name for name in names], question.replace("{0}", str(tmp_path)))


def test_dropped_files_with_a_question(chat: Conversation, directory: Path) -> None:
    picture = str(directory.parent / "my picture.png").replace(" ", "\\ ")
    chat.take(f"{picture} {picture} What are they?")
    assert [len(paths) for paths in chat.asked] == [2] and chat.session.turns[0].text == "What are they?"
    with pytest.raises(UserError, match="known image format"):
        chat.take(f"{picture} {directory}/config.json And these?")
    assert not chat.waiting and len(chat.asked) == 1  # nothing half done


def test_ctrl_c_ends_the_answer_only(chat: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.take("What?")
    monkeypatch.setattr("mlx_llama3v.cli.chat._say", _interrupt_after(3))
    chat.sampling = Sampling(max_tokens=50, temp=2.0, seed=1)
    chat.take("Go on")
    kept = len(chat.session.ids)
    monkeypatch.undo()
    chat.take("And now?")
    assert len(chat.session.turns) == 3 and chat.session.turns[2].start == kept


def test_a_retry_draws_another_answer(chat: Conversation, directory: Path) -> None:
    def held() -> list[list[str]]:
        talk, found = Conversation(chat.session, Sampling(max_tokens=6, temp=2.0, seed=3)), []
        talk.reset("")
        for line in ("What?", "/retry", "/retry", "What?"):
            talk.take(line)
            found.append(talk.session.answers())
        return found

    one = held()
    assert len({answers[-1] for answers in one}) == 4 and held() == one


def test_stats_are_those_of_the_last_answer(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.take("What?")
    with pytest.raises(UserError):
        chat.take("/edit " + "long " * 60_000)
    assert chat.last is not None  # it still is the last one
    chat.verbose, chat.last = True, replace(chat.last, finish_reason="repetition")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("mlx_llama3v.cli.chat._say", _interrupt_after(2))
        chat.take("Go on")
    assert len(chat.session.turns) == 2 and chat.last is None and not capsys.readouterr().err
    chat.take("/stats")
    assert "no answer" in capsys.readouterr().out


def _interrupt_after(count: int):
    calls = []

    def say(text: str) -> None:
        calls.append(text)
        if len(calls) == count:
            raise KeyboardInterrupt

    return say


def test_a_picture_whose_name_is_no_text(chat: Conversation, tmp_path: Path) -> None:
    picture = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        picture.write_bytes(png(1))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    chat.waiting = [picture]
    chat.take("What?")
    chat.take(f"/save {tmp_path}/talk.md")
    chat.take(f"/load {tmp_path}/talk.md")
    assert chat.asked == [(picture,)]


def test_answers_are_shown_and_never_obeyed(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat.session, "ask", lambda *_: iter([Piece("\x1b]0;x\x07a\x9b2J\r\nb\té\n")]))
    chat.take("What?")
    assert capsys.readouterr().out == "]0;xa2J\nb\té\n\n"


def test_names_with_brackets_are_shown_as_they_are(cli: Cli, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "photo[copy].jpg").write_bytes(png(1))
    lines = f"{tmp_path}/photo[copy].jpg\n/image [/tmp/a.png]\n/image :cat:.png\n"
    done = cli("chat", "--model", directory, stdin=lines)
    assert done.status == 0 and "photo[copy].jpg: 70 x 40" in done.out
    assert "error: [/tmp/a.png] cannot" in done.err and "error: :cat:.png cannot" in done.err


def test_tables_and_bars_show_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show.table("a[b].png :cat:", ["[text]", "[/x]"], [["a [red] circle [/y]", "[0]"]])
    with show.bar("[z]", "rows") as bar:
        bar.update(1, 2, "[/note]")
    said = capsys.readouterr()
    for text in ("a[b].png :cat:", "[text]", "[/x]", "a [red] circle [/y]", "[0]"):
        assert text in said.out
    assert "[z]" in said.err and "[/note]" in said.err


def test_a_transcript_survives_any_text() -> None:
    odd = "# Conversation\n## Answer\n![](<x>)\n\\# a\n\\\\![ b\n```\n## Question\n```\na\u2028b\x85c"
    exchanges = [Exchange(odd, (Path("/a b.png"), Path("/c(1).png")), odd), Exchange("x", (), "y")]
    assert from_markdown(to_markdown(odd, exchanges), "f") == (odd, exchanges)
    assert from_markdown(to_markdown(None, []), "f") == (None, [])
    for text in ("hello", to_markdown(None, exchanges).rpartition("## Answer")[0]):
        with pytest.raises(DataError, match=r"f( |:)"):
            from_markdown(text, "f")


PROMPT, ENTERED = r"\?2004h", r"\?2004l"  # what prompt_toolkit writes as it begins and ends to take a line


class Terminal:
    """A program on a pseudo terminal."""

    def __init__(self, *args: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            args, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        os.set_blocking(self.master, False)
        self.seen = ""

    def wait(self, pattern: str, seconds: float = 20) -> str:
        """What came until `pattern` did."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
            if found := re.search(pattern, self.seen, re.S):
                before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
                return before
        raise AssertionError(f"no {pattern!r} in {self.seen!r}")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_on_a_terminal(directory: Path) -> None:
    own = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"  # so that Ctrl-C is a signal
    options = ["--model", str(directory), "--loop-guard", "0", "--max-tokens", "90000"]
    terminal = Terminal(sys.executable, "-c", f"{own}\n{ENDLESS_CLI}", "chat", *options)
    try:
        terminal.wait("Ctrl-D leaves")
        terminal.wait(PROMPT)
        terminal.type("/images\r")
        terminal.wait("no picture yet.*" + PROMPT)
        terminal.type("\x1b[A")  # the line before, from the history
        terminal.type("\x01\x1b[C" + "x\r")  # with an x behind its slash
        terminal.wait("/ximages is neither.*" + PROMPT)
        terminal.type("/ret\t")
        terminal.wait("/ret.*ry")
        terminal.type("\r")
        terminal.wait("no question yet.*" + PROMPT)
        for question in ("Go on\r", "/retry\r"):
            terminal.type(question)
            terminal.wait(ENTERED + r"\S*\s+\S.{20}")  # the answer has begun
            terminal.type("\x03")
            assert "(stopped)" in terminal.wait(PROMPT)
        assert terminal.process.poll() is None
        terminal.type("/stats\r")
        terminal.wait("no answer yet.*" + PROMPT)
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)

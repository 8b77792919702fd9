"""What a person sees: progress bars with rate and time left on stderr, tables, and one last line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlx_llama3v.directory import leftovers as find_leftovers
from mlx_llama3v.errors import size as size
from mlx_llama3v.inference import Answer
from mlx_llama3v.platform import peak_memory

_SILENT = os.environ.get("MLX_RANK", "0") != "0"  # of several processes (mlx.launch) the first one speaks
_LINE, _SHORT = 84, 12  # columns of a bar without its note, and of a note for which a bar makes room
_AS_IT_IS: Any = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}  # names hold [brackets], too
out = Console(quiet=_SILENT, **_AS_IT_IS)
err = Console(stderr=True, **_AS_IT_IS)


class _Lines(Progress):
    """A line a task, and its note below where it is long: in 80 columns both would be cut."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.visible and task.fields["below"]:
                yield Text(f"  {task.fields['below']}", no_wrap=True, overflow="ellipsis")


class Bar:
    """One line of progress, or two; `update(done, total, note)` as often as one likes."""

    def __init__(self, progress: Progress, unit: str, label: str) -> None:
        self._progress, self._unit = progress, unit
        self._task = progress.add_task(label, total=None, rate="", note="", below="")
        self._before = 0  # done before this command
        self._used, self._shown = False, progress.console.is_terminal  # there it lives while a model is loaded
        if self._shown:
            progress.start()

    def begin(self, done: int, total: int) -> None:
        """That much was done before, at another rate."""
        self._progress.reset(self._task)
        self._before = done
        self.update(done, total)

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        if not self._shown:
            self._progress.start()
        self._used = self._shown = True
        if done < self._progress.tasks[self._task].completed:  # what came before is done, and has another rate
            self._progress.reset(self._task)
            self._before = 0
        beside = len(note) <= max(_SHORT, self._progress.console.width - _LINE)
        here, below = (note, "") if beside else ("", note)
        self._progress.update(self._task, completed=done, total=total, note=here, below=below)
        elapsed = self._progress.tasks[self._task].elapsed or 0.0
        if elapsed > 0:
            self._progress.update(self._task, rate=f"{(done - self._before) / elapsed:,.1f} {self._unit}/s")

    def close(self) -> None:
        """Leave its last state; nothing of a bar that never moved, above the sentence of an error."""
        if not self._used:
            self._progress.update(self._task, visible=False)
        if self._shown:
            self._progress.stop()


@contextmanager
def bar(label: str, unit: str) -> Iterator[Bar]:
    """A progress bar that stays on the terminal; where stderr is no terminal only its last state is printed."""
    columns = (
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    console = Console(quiet=True) if _SILENT else err
    with closing(Bar(_Lines(*columns, console=console, refresh_per_second=4), unit, label)) as made:
        yield made


def leftovers(target: Path) -> None:
    """Say what killed commands left beside `target`; a hidden directory of many gigabytes is easily forgotten."""
    for path, held in find_leftovers(target.expanduser().resolve().parent):
        err.print(f"note: {path} ({size(held)}) was left by a command that was killed; delete it.")


def warn(sentence: str) -> None:
    """A sentence on stderr, as it is."""
    err.print(sentence)


def lost(store: Path, count: int) -> None:
    """Say how many names a store lost to damaged shards."""
    if count:
        warn(f"{plural(count, 'name')} of damaged shards not in {store} now: run `llama3v-mlx embed` on their data.")


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    made = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index == 0 else "right", overflow="fold")  # no name is cut
    for row in rows:
        made.add_row(*row)
    out.print(made)


def as_json(values: Any) -> None:
    """Machine-readable output, nothing else on stdout."""
    if not _SILENT:
        text = json.dumps(values, indent=2, ensure_ascii=False)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:  # a file name that is no Unicode, or a terminal that knows little of it
            text = json.dumps(values, indent=2)
        sys.stdout.write(text + "\n")


def answer_stats(answer: Answer) -> str:
    """Pictures, token counts, rates, times and memory of an answer, in three short lines."""
    times, count = answer.timings, len(answer.tokens)
    prefill = f" ({answer.prompt_tokens / times.prefill:,.0f}/s)" if times.prefill else ""
    decode = f" ({(count - 1) / times.decode:,.1f}/s)" if count > 1 and times.decode else ""
    seen = (
        f", {plural(answer.slices, 'slice')}, {plural(answer.visual_tokens, 'visual token')}" if answer.slices else ""
    )
    return (
        f"prompt: {plural(answer.prompt_tokens, 'token')}{prefill}, {answer.cached_tokens} reused{seen}\n"
        f"answer: {plural(count, 'token')}{decode}, ended by {answer.finish_reason}\n"
        f"first token after {times.first_token:.3f} s (pictures {times.encode:.3f} s), "
        f"peak memory {size(peak_memory())}"
    )


def plural(count: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def answer_json(answer: Answer) -> dict[str, Any]:
    """Text, tokens and timings, JSON-ready."""
    values = {**vars(answer), "tokens": list(answer.tokens)}
    return {**values, "timings": {**vars(answer.timings), "first_token": answer.timings.first_token}}


def duration(seconds: float) -> str:
    """Seconds for people: 2 min 05 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"

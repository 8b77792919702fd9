"""Many questions from a JSONL file, answered in batches into a JSONL file that a killed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mlx_llama3v.errors import DataError, UserError
from mlx_llama3v.inference.answer import Answer
from mlx_llama3v.inference.batch import Request, batch_generate, render_request
from mlx_llama3v.inference.rows import room
from mlx_llama3v.inference.sampling import Sampling
from mlx_llama3v.inference.session import Session
from mlx_llama3v.text.prompt import Message


@dataclass(frozen=True)
class Job:
    """One line of the file: a question, and the files of its pictures."""

    id: str
    prompt: str
    images: tuple[Path, ...]
    number: int = 0  # among the questions of the file


@dataclass(frozen=True)
class Result:
    """What became of a job: an answer, or one sentence that says why there is none."""

    job: Job
    answer: Answer | None
    error: str = ""

    def line(self) -> dict[str, Any]:
        """JSON-ready."""
        values = {"id": self.job.id, "prompt": self.job.prompt, "images": [str(path) for path in self.job.images]}
        if self.answer is None:
            return {**values, "error": self.error}
        found = self.answer
        counts = {"prompt_tokens": found.prompt_tokens, "answer_tokens": len(found.tokens)}
        return {**values, "text": found.text, "finish_reason": found.finish_reason, **counts}


def read_jobs(lines: Iterable[str], name: str, folder: Path) -> list[Job]:
    """Lines of {"prompt", "image" or "images", "id"}; pictures lie in `folder`. Raises DataError."""
    jobs: list[Job] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}.") from error
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
            raise DataError(f'{where} has no "prompt"; expected {{"prompt": TEXT, "image": FILE}}.')
        if unknown := sorted(values.keys() - {"id", "prompt", "image", "images"}):
            raise DataError(f"{where}: {', '.join(unknown)} is unknown; expected id, prompt, image or images.")
        images = values.get("images", [])
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise DataError(f"{where}: images is {images!r}; expected a list of files.")
        if "image" in values:
            images = [values["image"], *images]
        if not all(isinstance(image, str) for image in images):
            raise DataError(f"{where}: image is {values['image']!r}; expected a file.")
        jobs.append(
            Job(str(values.get("id", number)), values["prompt"], tuple(folder / image for image in images), len(jobs))
        )
    twice = {job.id for job in jobs if sum(other.id == job.id for other in jobs) > 1} if _repeats(jobs) else set()
    if twice:
        raise DataError(f"{name}: the id {min(twice)!r} comes more than once; expected different ones.")
    return jobs


def _repeats(jobs: Sequence[Job]) -> bool:
    return len({job.id for job in jobs}) < len(jobs)


def unanswered(jobs: Sequence[Job], path: Path, by: Mapping[str, str] | None = None) -> list[Job]:
    """The jobs that no earlier run answered into `path`; lines cut short and errors are taken out of it.

    `by`: see `write_results`. Raises DataError where the file holds something else, answers by another model, or the
    answer to another question of the same id.
    """
    there = _answers(path, by or {})
    for job in jobs:
        if job.id in there and there[job.id] != _asked(job):
            raise DataError(
                f"{path} answers another question {job.id!r} than is asked now; choose another --output, or give the "
                'questions ids of their own ("id": ...).'
            )
    return [job for job in jobs if job.id not in there]


def _asked(job: Job) -> tuple[Any, ...]:
    return job.prompt, [str(path.absolute()) for path in job.images]


def _answers(path: Path, by: Mapping[str, str]) -> dict[str, tuple[Any, ...]]:
    """What the answers in `path` were asked, by id; the file then holds nothing but those."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    good: dict[str, bytes] = {}
    asked: dict[str, tuple[Any, ...]] = {}
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except ValueError:
            if number == len(lines) and line.startswith(b'{"id"'[: len(line)]) and not content.endswith(b"\n"):
                continue  # cut short as its writer was killed
            values = None
        if not isinstance(values, dict) or not _is_result(values):
            raise DataError(f"{path}, line {number} is no answer of ours; it is not overwritten.")
        if "text" in values:
            if other := [f"{key} {values[key]!r}" for key, value in by.items() if values.get(key, value) != value]:
                raise DataError(f"{path} holds answers of {', '.join(other)}; choose another --output.")
            good[values["id"]] = line
            asked[values["id"]] = values["prompt"], [str(Path(image).absolute()) for image in values["images"]]
    kept = b"".join(line + b"\n" for line in good.values())
    if kept != content:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(kept)
        partial.replace(path)
    return asked


def _is_result(values: dict[str, Any]) -> bool:
    """Whether this is a `Result.line`."""
    named = all(isinstance(values.get(name), str) for name in ("id", "prompt"))
    images = values.get("images")
    files = isinstance(images, list) and all(isinstance(image, str) for image in images)
    return named and files and isinstance(values.get("text", values.get("error")), str)


def answer_jobs(session: Session, jobs: Sequence[Job], sampling: Sampling, batch_size: int = 8) -> Iterator[Result]:
    """The results, a batch at a time. A picture that cannot be read fails its own job only."""
    for start in range(0, len(jobs), batch_size):
        ready: list[tuple[Job, Request]] = []
        for job in jobs[start : start + batch_size]:
            try:
                ready.append((job, _request(session, job)))
            except UserError as error:
                yield Result(job, None, str(error))
        requests = [request for _, request in ready]
        found = batch_generate(
            session.model,
            session.tokens,
            requests,
            sampling=[sampling.nth(job.number) for job, _ in ready],
            batch_size=batch_size,
            max_context=session.memory.max_kv_size,
            prefill_step_size=session.memory.prefill_step_size,
        )
        yield from (Result(job, answer) for (job, _), answer in zip(ready, found, strict=True))


def _request(session: Session, job: Job) -> Request:
    pictures = tuple(session.encode(path) for path in job.images)
    messages = [Message("user", job.prompt, tuple(range(len(pictures))))]
    if session.system:
        messages.insert(0, Message("system", session.system))
    request = Request(tuple(messages), pictures)
    room(session.model, len(render_request(session.model, session.tokens, request)), session.memory.max_kv_size)
    return request


def write_results(
    results: Iterable[Result], out: TextIO, tell: Callable[[Result], None], by: Mapping[str, str] | None = None
) -> tuple[int, int]:
    """One line a result, at once on disk; returns how many were answered and how many failed.

    `by`: who answers (model, run), written into each line.
    """
    counts = [0, 0]
    for result in results:
        out.write(json.dumps({**result.line(), **(by or {})}) + "\n")  # in ASCII: a prompt may hold half a character
        out.flush()
        counts[result.answer is None] += 1
        tell(result)
    return counts[0], counts[1]

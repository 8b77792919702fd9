"""`train --embed-ahead`: a second process encodes what training reads next, so that the data may exceed the disk.

The parent knows the layout of every picture from its header, so rows, lengths and order are as with a full store; it
starts the encoder, writes down the reads of the whole run while that is at work on the first of them, and reads through
a RollingStore. The child (`python -m mlx_llama3v.ahead DIRECTORY`) encodes them in that order within the budget; it
ends when all is done or when its parent is gone. A resumed run starts a new child at its own turn; of the run before it
takes what the codec was fitted to, and the pictures of held-out rows. Nothing is written before the trainer asks for
these (RollingStore.hold), or for the first batch: it has the run directory for itself then.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.config import SliceLayout
from mlx_llama3v.embeddings.codec import DEFAULT as DEFAULT_CODEC
from mlx_llama3v.embeddings.codec import Fit, get_codec
from mlx_llama3v.embeddings.embed import embed_images
from mlx_llama3v.embeddings.rolling import RollingStore, RollingWriter, read_name
from mlx_llama3v.embeddings.sample import fit_sample
from mlx_llama3v.embeddings.shard import write_atomic
from mlx_llama3v.embeddings.store import Manifest, Store, plain
from mlx_llama3v.embeddings.writer import Post, StoreWriter
from mlx_llama3v.encoder import load_encoder, load_post
from mlx_llama3v.errors import StoreError, UserError, size
from mlx_llama3v.estimate import picture_sizes
from mlx_llama3v.hub import resolve
from mlx_llama3v.vision.encode import Encoder
from mlx_llama3v.vision.tiling import plan

SPEC, READS, LOG, CHANNELS, HELD = "spec.json", "reads.jsonl", "encoder.log", "channels.safetensors", "held-out"
_ROLLING = "rolling-"
_CHILD = "from mlx_llama3v.platform import without_torch as f; f(); from mlx_llama3v.ahead import main; main()"
_CHUNK = 2048  # reads that are handed to the pipeline at once
_PAUSE = 0.02  # seconds between two looks at a file that grows


@dataclass(frozen=True)
class AheadConfig:
    """How a run is embedded while it trains."""

    model: str
    budget: int  # bytes of shards on disk
    codec: str = DEFAULT_CODEC
    pool: int | None = None
    after_projector: str | None = None
    max_slices: int | None = None
    batch_size: int = 16
    offline: bool = False


class Ahead:
    """The encoder's process, and the store that it fills. Use it as a context manager: the process ends with it."""

    def __init__(
        self, directory: Path, config: AheadConfig, images: Mapping[str, Path], *, resume: bool = False
    ) -> None:
        """Read the header of every picture; write nothing.

        `resume`: read the same codes as the run before. Raises StoreError where not one picture can be read.
        """
        self._directory, self._config, self._images = directory, config, images
        self._fitted = resume  # whether a codec that was fitted there is this run's
        self._process: subprocess.Popen[bytes] | None = None
        self._reads: _Reads | None = None
        model = load_config(resolve(config.model, offline=config.offline))
        encoder = self._encoder
        self._post = post = _post(config)
        layouts, problems = scan(images, encoder)
        if problems and not layouts:
            why = next(iter(problems.values()))
            raise StoreError(
                f"not one of {len(problems)} pictures can be read, the first: {why.rstrip('.')}; "
                "--image-folder says where names in the data file start."
            )
        describe = plain(post.describe()) if post is not None else {}
        self._width = model.hidden_size if "projector" in describe else model.projector_config.in_dim
        if post is not None:
            layouts = {name: post.layout(layout) for name, layout in layouts.items()}
        self._check_budget(layouts, self._width)
        manifest = Manifest(encoder.fingerprint(), config.codec, describe)
        self.store = RollingStore(
            directory, manifest, self._width, layouts, problems, self._hold, self._check, self._start
        )

    @cached_property
    def _encoder(self) -> Encoder:
        """Until the other process has its own: the training needs the memory."""
        return load_encoder(self._config.model, max_slices=self._config.max_slices, offline=self._config.offline)

    def _hold(self, names: Sequence[str]) -> Store:
        """The pictures that are read at any time, in a store of their own. Raises StoreError."""
        self._fit()
        path, size = self._directory / HELD, self._config.batch_size
        with StoreWriter(path, self._encoder.fingerprint(), self._config.codec, post=self._post) as writer:
            if not writer.fitted:
                writer.fit(Fit(load((self._directory / CHANNELS).read_bytes()), {}))
            embed_images([(name, self._images[name]) for name in names], self._encoder, writer, batch_size=size)
        return Store(path)

    def _fit(self) -> None:
        """Fit the codec, once a run, to a sample of its pictures; what an earlier run made with its own one goes."""
        file, codec = self._directory / CHANNELS, get_codec(self._config.codec)
        if self._fitted and file.exists():
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # first: without it, a run that is killed here leaves nothing to go on with
        shutil.rmtree(self._directory / HELD, ignore_errors=True)
        known, size = [path for name, path in self._images.items() if name in self.store], self._config.batch_size
        fit = fit_sample(codec, known, self._encoder, self._post, batch_size=size) if codec.has_channels else None
        # Where no picture of the sample can be read, any channels will do.
        channels = fit.channels if fit else codec.fit(np.zeros((1, self._width), np.float32))
        write_atomic(file, [save(dict(channels))])
        self._fitted = True

    def _check_budget(self, layouts: Mapping[str, SliceLayout], width: int) -> None:
        """Raises StoreError where not even one picture fits: training would wait for each, one after the other."""
        most = max((layout.patches for layout in layouts.values()), default=0)
        largest, budget = get_codec(self._config.codec).row_bytes(width) * most, self._config.budget
        if budget < largest:
            raise StoreError(
                f"the largest picture takes {size(largest)}, but --store-budget is {size(budget)}; expected room for "
                "several batches of pictures."
            )

    def _start(self, turns: Iterable[tuple[int, Sequence[str]]]) -> Path:
        """Start the encoder on the reads of these turns (another one, if there was, ends), which a thread asks for.

        In a new directory: the encoder of a run that was killed may live for a moment longer.
        """
        self.close()
        self._fit()
        vars(self).pop("_encoder", None)
        for old in self._directory.glob(f"{_ROLLING}*"):
            if not _lives(old):
                shutil.rmtree(old, ignore_errors=True)
        target = self._directory / f"{_ROLLING}{os.getpid()}"
        target.mkdir(parents=True)
        always = set(self.store.held_names)
        lines = (
            json.dumps([turn, [[name, str(self._images[name])] for name in dict.fromkeys(names) if name not in always]])
            for turn, names in turns
        )
        self._reads = _Reads(target / READS, lines)
        write_atomic(target / SPEC, [json.dumps(asdict(self._config)).encode()])
        command = [sys.executable, "-c", _CHILD, str(target), str(os.getpid())]
        with open(self._directory / LOG, "wb") as log:
            # Ctrl-C reaches all of a session. It is for the parent, which saves what was trained and ends this process.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._reads.start()
        return target

    def _check(self) -> None:
        """Raises StoreError where the encoder has ended, or is told no more, and something is still wanted of it."""
        if self._reads is not None and (error := self._reads.error) is not None:
            raise StoreError(f"what is to be read next cannot be written to {self._directory}: {error}") from error
        if self._process is not None and self._process.poll() not in (None, 0):
            lines = (self._directory / LOG).read_text(errors="replace").strip().splitlines()
            why = lines[-1] if lines else f"status {self._process.returncode}"
            raise StoreError(f"the encoder of {self._directory} has ended: {why}")

    def close(self) -> None:
        """End the encoder."""
        if self._reads is not None:
            self._reads.close()
            self._reads = None
        if self._process is not None:
            self._process.kill()  # nothing that it has is needed any more
            self._process.wait()
            self._process = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        shutil.rmtree(self._directory / f"{_ROLLING}{os.getpid()}", ignore_errors=True)


class _Reads(Thread):
    """Writes one line a turn to a file that the encoder follows: number, names and paths; after the last one null.

    To know them means to lay out all rows of the run, which takes minutes for a million. Half of the time is left to
    the training.
    """

    def __init__(self, file: Path, lines: Iterable[str]) -> None:
        super().__init__(name="reads", daemon=True)
        self._file, self._lines, self._closed = file, chain(lines, ("null",)), Event()
        self.error: Exception | None = None
        file.touch()

    def run(self) -> None:
        """Until all are written or `close` is called; an error waits in `error`."""
        try:
            with open(self._file, "w", encoding="utf-8") as file:
                started = time.perf_counter()
                for line in self._lines:
                    file.write(f"{line}\n")
                    file.flush()
                    if self._closed.wait(time.perf_counter() - started):
                        return
                    started = time.perf_counter()
        except Exception as error:
            self.error = error

    def close(self) -> None:
        """Write no more."""
        self._closed.set()
        self.join()


def _lives(rolling: Path) -> bool:
    """Whether another process trains from there; a second start is refused, and must not take that away before."""
    try:
        parent = int(rolling.name.removeprefix(_ROLLING))
        os.kill(parent, 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return parent != os.getpid()


def scan(
    images: Mapping[str, Path], encoder: Encoder, threads: int = 8
) -> tuple[dict[str, SliceLayout], dict[str, str]]:
    """Layouts of all pictures, from their headers alone, and why the others have none."""
    layouts, problems = {}, {}
    for found in picture_sizes(images, encoder.image.max_pixels, threads):
        for name, sides in found:
            if isinstance(sides, str):
                problems[name] = sides
            else:
                layouts[name] = plan(*sides, encoder.vision, encoder.tiling).layout
    return layouts, problems


def _post(config: AheadConfig) -> Post | None:
    projector = Path(config.after_projector) if config.after_projector else None
    return load_post(config.model, config.pool, projector, offline=config.offline)


def encode(directory: Path, parent: int) -> None:
    """What the child does. Raises UserError."""
    values: dict[str, Any] = json.loads((directory / SPEC).read_bytes())
    config = AheadConfig(**values)
    encoder = load_encoder(config.model, max_slices=config.max_slices, offline=config.offline)
    post = _post(config)

    def check() -> None:
        if os.getppid() != parent:
            raise SystemExit(1)

    def wait() -> None:
        check()
        writer.flush()  # the reader may want what is encoded so far

    channels = load((directory.parent / CHANNELS).read_bytes())
    writer = RollingWriter(directory, encoder.fingerprint(), config.codec, config.budget, post, channels, check)
    try:
        turn = -1
        for chunk, turn in _chunks(directory / READS, wait):  # noqa: B007 (the last one is told at the end)
            check()
            embed_images(chunk, encoder, writer, batch_size=config.batch_size)  # type: ignore[arg-type]
        writer.end(turn)
    finally:
        writer.close()


def _end_with(parent: int) -> None:
    """Nobody reads what is encoded for a run that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _chunks(file: Path, wait: Callable[[], None]) -> Iterator[tuple[list[tuple[str, Path]], int]]:
    """Reads of whole turns, about _CHUNK at once, or what there is so far, and their last turn."""
    chunk: list[tuple[str, Path]] = []
    turn, line = -1, ""
    with open(file, encoding="utf-8") as lines:
        while (line := line + lines.readline()) != "null\n":
            whole = line.endswith("\n")
            if whole:
                turn, images = json.loads(line)
                chunk += [(read_name(turn, name), Path(path)) for name, path in images]
                line = ""
            if chunk and (len(chunk) >= _CHUNK or not whole):
                yield chunk, turn
                chunk = []
            elif not whole:  # its writer has not come further
                wait()
                time.sleep(_PAUSE)
    yield chunk, turn


def main() -> None:
    """The child's command line: DIRECTORY PARENT."""
    parent = int(sys.argv[2])
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        encode(Path(sys.argv[1]), parent)
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

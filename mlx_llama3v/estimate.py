"""What embedding a data set will cost, before any of it is done: slices, bytes on disk, time.

Sizes come from the pictures' headers alone; all else follows from them by arithmetic, so one scan answers for every
codec and every cap on slices. Equal files under two names are stored once but counted twice here: their contents are
not read. The time is measured on a few pictures of the set, on this device.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_llama3v.config import Encoded, ImageConfig, ProjectorConfig, SliceLayout, TilingConfig, VisionConfig
from mlx_llama3v.data.hf import TableCell
from mlx_llama3v.data.records import Problem
from mlx_llama3v.data.sources import FilePart
from mlx_llama3v.embeddings.codec import CODECS, get_codec
from mlx_llama3v.embeddings.damage import mendable, read_notes
from mlx_llama3v.embeddings.sample import check_names, evenly
from mlx_llama3v.embeddings.store import MANIFEST, Manifest, Store, plain, shard_files
from mlx_llama3v.embeddings.writer import Post
from mlx_llama3v.errors import DamagedError, ImageError, ManifestError, StoreError, size
from mlx_llama3v.platform import device_name
from mlx_llama3v.source import Source
from mlx_llama3v.vision.encode import Encoder
from mlx_llama3v.vision.image import image_size
from mlx_llama3v.vision.pool import pooled_layout
from mlx_llama3v.vision.tiling import MOST_PATCHES, Size, plan

_CHUNK = 256  # pictures a thread takes at a time
_RUN, _RUNS = 16, 32  # pictures of a table that are looked at in one place; places
_INDEX_BYTES = 200  # a picture's share of a shard's index: hash, name, layout
_SPARE_BYTES = 16 << 20  # that stay free: manifest, failures, the file system's own


@dataclass(frozen=True)
class Scan:
    """What the headers say."""

    sizes: Mapping[Size, int]  # (width, height) -> how many pictures
    unreadable: Mapping[str, str]  # name -> reason
    seconds: float

    @property
    def pictures(self) -> int:
        """Readable ones, by name."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Form:
    """How embeddings are made and held, apart from the codec."""

    vision: VisionConfig
    tiling: TilingConfig
    pool: int = 1
    projector: ProjectorConfig | None = None  # whose output is stored
    embedding: int | None = None  # values of one patch's embedding, where they are not the tower's width (S2)

    @property
    def width(self) -> int:
        """Values of one stored row."""
        if self.projector is not None:
            return self.projector.out_dim
        return self.embedding or self.vision.hidden_size

    def rows(self, layout: SliceLayout) -> int:
        """Stored rows of one picture."""
        pooled = pooled_layout(layout, self.pool)
        return pooled.patches if self.projector is None else sum(map(self.projector.num_tokens, pooled.grids))


@dataclass(frozen=True)
class Volume:
    """What all pictures become."""

    pictures: int
    slices: int
    patches: int  # that the tower makes
    rows: int  # that are stored
    bytes: Mapping[str, int]  # by codec


@dataclass(frozen=True)
class Speed:
    """What was measured on this device; 0 where there was nothing to measure on."""

    encode_seconds: float = 0.0  # a patch of the layout
    slice_seconds: float = 0.0
    prepare_seconds: float = 0.0  # a picture, on one core
    slices: int = 0  # that were timed


@dataclass(frozen=True)
class Estimate:
    """The whole answer."""

    reused: int  # pictures that the store holds already; all below is of the others
    unreadable: Mapping[str, str]  # name -> reason
    problems: tuple[Problem, ...]  # of the data and of its pictures
    damage: tuple[str, ...]  # a sentence a shard that `embed` would set aside: its pictures are to be made anew
    volume: Volume
    speed: Speed
    seconds: float  # for all pictures
    free: int  # bytes on the store's disk
    codec: str
    max_slices: int
    advice: str  # the smaller store that would fit, where the one that was asked for does not
    scan_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = asdict(replace(self, unreadable={}, problems=(), volume=replace(self.volume, bytes={})))
        volume = values.pop("volume") | {"bytes": dict(self.volume.bytes)}
        fits = {name: size <= self.free for name, size in self.volume.bytes.items()}
        left_out = {"unreadable": dict(self.unreadable), "problems": list(map(str, self.problems))}
        return values | volume | {"fits": fits, "damage": [*self.damage]} | left_out


def missing(
    pictures: Mapping[str, Source],
    store: Path,
    encoder: Encoder,
    codec: str,
    post: Post | None,
    damage: list[DamagedError],
) -> dict[str, Source]:
    """What `embed` would encode: all but what whole shards of the store, if it is there, and of the parts that killed
    ranks left in it hold; `damage` takes the others.

    Raises StoreError where `embed` would: made with other settings, other pictures of these names.
    """
    wanted = Manifest(plain(encoder.fingerprint()), codec, {} if post is None else plain(post.describe()))
    settings = {"fingerprint": wanted.fingerprint, "codec": codec, "post": wanted.post}
    left, common = dict(pictures), False
    for place in (store, *sorted(store.glob("rank-*-of-*"))):
        if not place.is_dir() or not ((place / MANIFEST).exists() or shard_files(place)):
            continue
        try:  # a common manifest that can be written anew is; a part that does not belong there is set aside
            mended = place == store and mendable(place, wanted)
            manifest = wanted if mended else Manifest.read(place)
        except ManifestError:
            if place == store:
                raise
            continue
        if common and manifest.differences(settings):
            continue
        manifest.check(place, **settings)
        common, there = True, Store(place, damage=damage, noted=read_notes(place), manifest=manifest)
        held = {name: source for name, source in left.items() if name in there}
        check_names(place, [*held.items()], there.sha_of)
        left = {name: source for name, source in left.items() if name not in held}
    return left


def scan(
    pictures: Mapping[str, Source],
    config: ImageConfig,
    *,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Read the size of every picture from its header. `progress` is told (done, total), in this thread.

    Threads overlap the disk's delays; Pillow needs about 30 µs a header.
    """
    started = time.perf_counter()
    sizes: Counter[Size] = Counter()
    unreadable: dict[str, str] = {}
    done = 0
    for found in picture_sizes(pictures, config.max_pixels, threads):
        for name, sides in found:
            if isinstance(sides, str):
                unreadable[name] = sides
            else:
                sizes[sides] += 1
        done += len(found)
        if progress is not None:
            progress(done, len(pictures))
    return Scan(sizes, unreadable, time.perf_counter() - started)


def picture_sizes(
    pictures: Mapping[str, Source], max_pixels: int, threads: int
) -> Iterator[list[tuple[str, Size | str]]]:
    """Names with (width, height), or with why there is none; in order, many at a time: a future takes two kilobytes."""
    items = iter(pictures.items())

    def measure(chunk: Sequence[tuple[str, Source]]) -> list[tuple[str, Size | str]]:
        return [(name, _size(source, max_pixels)) for name, source in chunk]

    chunks = iter(lambda: list(islice(items, _CHUNK)), [])
    if any(isinstance(source, TableCell) for source in pictures.values()):
        threads = 1  # every thread that reads a table holds a part of it
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        yield from pool.map(measure, chunks)


def _size(source: Source, max_pixels: int) -> Size | str:
    """(width, height), or why there is none."""
    try:
        if isinstance(source, Path):
            return image_size(source, max_pixels)
        if isinstance(source, FilePart):
            try:
                return image_size(source.head(), max_pixels)
            except ImageError:  # a header longer than that, or a format that wants the whole file
                pass
        return image_size(source.read(), max_pixels)
    except (ImageError, OSError, ValueError) as error:
        return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def volume(sizes: Mapping[Size, int], form: Form) -> Volume:
    """Count slices and bytes; no picture is touched."""
    slices = patches = rows = 0
    for picture, count in sizes.items():
        layout = plan(*picture, form.vision, form.tiling).layout
        slices += count * len(layout.grids)
        patches += count * layout.patches
        rows += count * form.rows(layout)
    pictures = sum(sizes.values())
    fixed = pictures * _INDEX_BYTES
    sizes_by_codec = {name: fixed + rows * get_codec(name).row_bytes(form.width) for name in CODECS}
    return Volume(pictures, slices, patches, rows, sizes_by_codec)


def most_bytes(pictures: int, form: Form, codec: str) -> int:
    """What no set of that many pictures exceeds: all of them split as far as the cap allows."""
    grid = (form.vision.grid,) * 2 if form.tiling.mode != "minicpm" else (MOST_PATCHES, 1)
    split = form.tiling.mode in ("uhd", "minicpm")
    layout = SliceLayout(grid, 1, form.tiling.max_slices, grid) if split else SliceLayout(grid)
    rows = max(form.rows(layout), layout.patches)  # a long slice pools into more rows than a square one
    return pictures * (_INDEX_BYTES + rows * get_codec(codec).row_bytes(form.width))


def measure(
    pictures: Iterable[Source],
    encoder: Encoder,
    batch_size: int,
    *,
    post: Post | None = None,
    batches: int = 3,
    limit_seconds: float = 20.0,
) -> Speed:
    """Prepare and encode a few batches of real pictures, `post` included; unreadable ones are passed over.

    One batch warms up (kernels, caches) and is not counted, unless it is all there is or takes too long for more.
    """
    slices: list[Any] = []
    prepared, prepare_seconds = 0, 0.0
    for source in pictures:
        started = time.perf_counter()
        try:
            layout, found = encoder.prepare(source)
        except (ImageError, OSError, ValueError):
            continue
        prepare_seconds += time.perf_counter() - started
        prepared += 1
        slices += zip(layout.grids, found, strict=True)
        if len(slices) >= batches * batch_size:
            break
    if not slices:
        return Speed()

    def timed(chosen: list[Any]) -> float:
        started = time.perf_counter()
        made = encoder.encode(chosen, batch_size)
        if post is not None:
            for (grid, _), values in zip(chosen, made, strict=True):
                post(Encoded(SliceLayout(grid), values))  # a slice as a picture of its own
        return time.perf_counter() - started

    chosen = slices[:batch_size]
    seconds = timed(chosen)
    if seconds < limit_seconds:
        chosen = slices[: batch_size * max(1, min(batches, int(limit_seconds / max(seconds, 1e-9))))]
        seconds = timed(chosen)
    patches = sum(rows * columns for (rows, columns), _ in chosen)
    return Speed(seconds / patches, seconds / len(chosen), prepare_seconds / prepared, len(chosen))


def free_bytes(path: Path) -> int:
    """Free bytes on the disk on which `path` lies or will lie."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return max(0, shutil.disk_usage(place).free - _SPARE_BYTES)


def advice(sizes: Mapping[Size, int], form: Form, codec: str, free: int) -> str:
    """The options under which the store fits: a smaller codec first, then a lower cap, then both; empty for none."""
    smaller = sorted(CODECS, key=lambda name: get_codec(name).row_bytes(form.width))
    smaller = [
        name for name in smaller if get_codec(name).row_bytes(form.width) < get_codec(codec).row_bytes(form.width)
    ]
    caps = range(form.tiling.max_slices - 1, -1, -1) if form.tiling.mode in ("uhd", "minicpm") else ()
    whole = volume(sizes, form).bytes
    for name in reversed(smaller):  # the largest that fits loses least
        if whole[name] <= free:
            return f"--codec {name}"
    for names in ((codec,), tuple(reversed(smaller))):
        for cap in caps:
            bytes_ = volume(sizes, replace(form, tiling=replace(form.tiling, max_slices=cap))).bytes
            for name in names:
                if bytes_[name] <= free:
                    return f"--max-slices {cap}" + (f" --codec {name}" if name != codec else "")
    return ""


def require_room(
    pictures: Mapping[str, Source],
    image: ImageConfig,
    form: Form,
    codec: str,
    output: Path,
    ranks: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Refuse what the disk cannot hold. Raises StoreError that names options under which it would fit.

    Headers are read only where the largest that these pictures can become would not fit; of tables, which would be
    read whole, those of a sample. `ranks` processes with a part of this size each share the disk.
    """
    free = free_bytes(output) // ranks
    if most_bytes(len(pictures), form, codec) <= free:
        return
    some = _runs(pictures) if any(isinstance(source, TableCell) for source in pictures.values()) else pictures
    found, share = scan(some, image, progress=progress), len(some) / len(pictures)
    needed, free = volume(found.sizes, form).bytes[codec] / share, int(free * share)
    if needed * share <= free:
        return
    options = advice(found.sizes, form, codec, free)
    way = f"{options} would fit" if options else "no codec or cap on slices would fit: free some space"
    raise StoreError(
        f"{output} would need {size(needed)} for {found.pictures / share:,.0f} pictures, its disk has "
        f"{size(free / share)} free; {way} (--no-check-disk starts all the same)."
    )


def _runs(pictures: Mapping[str, Source]) -> dict[str, Source]:
    """A sample in a few places, some neighbours at each: that reads little of a table."""
    items = [*pictures.items()]
    starts = evenly(range(0, len(items), _RUN), _RUNS)
    return {name: source for start in starts for name, source in items[start : start + _RUN]}


def duration(volume: Volume, speed: Speed, workers: int) -> float:
    """Seconds for all. A GPU encodes while the cores prepare: the slower one counts; a CPU does both with its cores."""
    cores = max(1, min(workers, os.cpu_count() or 1))
    parts = volume.patches * speed.encode_seconds, volume.pictures * speed.prepare_seconds / cores
    return sum(parts) if device_name() == "cpu" else max(parts)

"""Does anything but the tower hold `embed` up: its rate beside encoding alone, and what its input side can feed.

    python benchmarks/pipeline.py [--tower base] [--photos 2000] [--large 200] [--encode 1.0] [--output pipeline.json]

JPEG photos of 640x480 and 4000x3000 are drawn at the start, each file its own content. For each size:

(1) slices a second of the tower alone on slices in memory, and of `embed` from the files to the finished store, on the
same tower (random weights); `--encode 0.1` takes a tenth of the photos for that. Beside it, the seconds that
`embed --estimate` said.
(2) the same with a device that is not this CPU: it only waits, `--device-rate` slices a second, as a GPU would.
(3) pictures a second with an encoder that costs nothing, beside Pillow's own limit with as many threads: opening,
converting and resizing to the same sizes, nothing else; plain, and decoding JPEGs small (draft) as `embed` does. All
three take turns.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_llama3v import estimate
from mlx_llama3v.config import Grid, ImageConfig, TilingConfig, VisionConfig
from mlx_llama3v.embeddings.embed import EmbedSummary, embed_images
from mlx_llama3v.embeddings.sample import evenly
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.platform import default_dtype, machine, peak_memory
from mlx_llama3v.vision.encode import Encoder, Form
from mlx_llama3v.vision.siglip import VisionTower
from mlx_llama3v.vision.tiling import plan

TOWERS = {
    "small": VisionConfig(384, 1536, 6, 6),
    "base": VisionConfig(),
    "so400m": VisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14),
}
SIZES = {"640x480": (640, 480), "4000x3000": (4000, 3000)}
DRAWN = 4  # pictures of a size; the files differ by a comment
BATCH = 16
ROUNDS = 3

Images = Sequence[tuple[str, Path]]


class Device(Encoder):
    """Takes `seconds` a slice and no processor; `width` values a patch come out."""

    seconds, width = 0.0, 8

    def encode_as(
        self, form: Form, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8
    ) -> list[dict[str, np.ndarray]]:
        """Ones of the right shapes; whatever `form` is, they never were on a device."""
        if self.seconds:
            time.sleep(self.seconds * len(slices))
        self.rows += sum(len(patches) for _, patches in slices)
        return [{"values": _ones(len(patches), self.width)} for _, patches in slices]

    def fingerprint(self) -> dict[str, object]:
        """Of nothing."""
        return {"benchmark": "pipeline"}


@lru_cache
def _ones(rows: int, width: int) -> np.ndarray:
    """Made once: an encoder that is not there must cost nothing."""
    return np.ones((rows, width), np.float32)


def draw(width: int, height: int, seed: int) -> bytes:
    """A JPEG of a photo's size and statistics: shapes of all scales, fainter the finer, and a camera's noise."""
    random = np.random.default_rng(seed)
    values = np.full((height, width, 3), 128, np.float32)
    for cells, strength in ((6, 55), (24, 35), (96, 22), (384, 10)):
        coarse = random.standard_normal((max(2, cells * height // width), cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            values[..., channel] += strength * np.asarray(layer)
    values += 4 * random.standard_normal((height, width, 1)).astype(np.float32)
    content = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
    return content.getvalue()


def photos(folder: Path, size: tuple[int, int], count: int) -> Images:
    """`count` files, no two with equal bytes."""
    drawn = [draw(*size, seed) for seed in range(min(count, DRAWN))]
    found = []
    for number in range(count):
        comment = f"{number:08d}".encode()
        content = drawn[number % len(drawn)]
        path = folder / f"{size[0]}-{number:06d}.jpg"
        path.write_bytes(content[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + content[2:])
        found.append((path.name, path))
    return found


def embed(encoder: Encoder, images: Images, workers: int, codec: str = "int4") -> EmbedSummary:
    """All of it, into a new store."""
    with (
        tempfile.TemporaryDirectory() as folder,
        StoreWriter(Path(folder) / "store", encoder.fingerprint(), codec) as writer,
    ):
        return embed_images(images, encoder, writer, batch_size=BATCH, workers=workers)


def alone(encoder: Encoder, images: Images) -> Callable[[], float]:
    """Slices a second of the tower, on two batches of slices."""
    slices: list[tuple[Grid, np.ndarray]] = []
    for _, path in images:
        layout, patches = encoder.prepare(path)
        slices += zip(layout.grids, patches, strict=True)
        if len(slices) >= 2 * BATCH:
            break
    encoder.encode(slices[:BATCH], BATCH)

    def run() -> float:
        started = time.perf_counter()
        encoder.encode(slices, BATCH)
        return len(slices) / (time.perf_counter() - started)

    return run


def pillow(images: Images, encoder: Encoder, threads: int, draft: bool) -> float:
    """Pictures a second of Pillow alone, resized to what the tiling asks for."""

    def load(item: tuple[str, Path]) -> None:
        with Image.open(item[1]) as image:
            sizes = plan(*image.size, encoder.vision, encoder.tiling)
            if draft:
                width, height = sizes.largest_px
                image.draft(None, (2 * width, 2 * height))
            picture = image.convert("RGB")
            for size in dict.fromkeys((sizes.overview_px, sizes.largest_px)):
                picture.resize(size, Image.Resampling.BICUBIC)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(load, images))
    return len(images) / (time.perf_counter() - started)


def input_side(free: Device, images: Images, threads: int) -> dict[str, float]:
    """Medians of a few rounds, pictures a second and core."""
    rates: dict[str, list[float]] = {"embed": [], "pillow": [], "pillow_draft": []}
    for _ in range(ROUNDS):
        rates["embed"].append(len(images) / embed(free, images, threads, "float16").seconds)
        rates["pillow"].append(pillow(images, free, threads, draft=False))
        rates["pillow_draft"].append(pillow(images, free, threads, draft=True))
    found = {f"{name}_images_per_s_a_core": statistics.median(values) / threads for name, values in rates.items()}
    for name in ("pillow", "pillow_draft"):
        found[f"of_{name}"] = statistics.median(rates["embed"]) / statistics.median(rates[name])
    return found


def with_tower(encoder: Encoder, images: Images, workers: int) -> dict[str, float]:
    """The tower alone before and after `embed`, since machines change their speed; and what --estimate said."""
    sizes = estimate.scan(dict(images), encoder.image).sizes
    volume = estimate.volume(sizes, estimate.Form(encoder.vision, encoder.tiling))
    speed = estimate.measure(evenly([path for _, path in images], 4 * BATCH), encoder, BATCH)
    measure = alone(encoder, images)
    rates = [measure()]
    summary = embed(encoder, images, workers)
    rates.append(measure())
    rate = summary.slices / summary.seconds
    return {
        "images": len(images),
        "slices": summary.slices,
        "alone_slices_per_s": statistics.mean(rates),
        "embed_slices_per_s": rate,
        "ratio": rate / statistics.mean(rates),
        "estimated_seconds_of_real": estimate.duration(volume, speed, workers) / summary.seconds,
        "waiting_share": summary.waiting_seconds / summary.seconds,
        "padding_share": 1 - summary.patches / summary.rows,
    }


def with_device(device: Device, images: Images, rate: float, workers: int) -> dict[str, float]:
    """As much as fits into ten seconds."""
    per_image = len(device.prepare(images[0][1])[0].grids)
    images = images[: max(1, int(10 * rate / per_image))]
    device.seconds, device.width = 1 / rate, device.vision.hidden_size
    summary = embed(device, images, workers)
    device.seconds, device.width = 0.0, Device.width
    return {"rate": rate, "images": len(images), "ratio": summary.slices / summary.seconds / rate}


def main() -> None:
    """Draw, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=TOWERS, default="base")
    parser.add_argument("--max-slices", type=int, default=TilingConfig().max_slices)
    parser.add_argument("--photos", type=int, default=2000, help="of 640x480; 0: none")
    parser.add_argument("--large", type=int, default=200, help="of 4000x3000; 0: none")
    parser.add_argument("--encode", type=float, default=1.0, help="share of them that the real tower gets; 0: none")
    parser.add_argument("--device-rate", type=float, default=30.0, help="slices a second of the device that waits")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    vision = TOWERS[args.tower]
    parts = (vision, ImageConfig(), TilingConfig(max_slices=args.max_slices))
    tower = VisionTower(vision)
    tower.set_dtype(default_dtype())
    device = Device(tower, *parts)
    results: dict[str, object] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    print(json.dumps(results))
    for (name, size), count in zip(SIZES.items(), (args.photos, args.large), strict=True):
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            images = photos(Path(folder), size, count)
            found = {"bytes_a_file": images[0][1].stat().st_size, "input": input_side(device, images, args.workers)}
            found["device"] = with_device(device, images, args.device_rate, args.workers)
            if some := int(count * args.encode):
                found["tower"] = with_tower(Encoder(tower, *parts), images[:some], args.workers)
        results[name] = found
        print(f"{name}: {json.dumps(found, indent=2)}", flush=True)
    results["peak_memory"] = peak_memory()
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How many pictures a second `embed --estimate` looks at: headers of JPEG files, tar members and parquet cells.

    python benchmarks/scan.py [--images 4000] [--side 640x480] [--output scan.json]

A folder of JPEGs is generated (each its own content, with an EXIF block as cameras write it), and the same as one tar
shard and, where pyarrow is installed, one parquet file. Printed: seconds to list and to scan, images a second with
1 and 4 threads, and the seconds that counting slices takes for as many different sizes.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_llama3v.config import ImageConfig, TilingConfig, VisionConfig
from mlx_llama3v.data.dataset import DataSet, read_data
from mlx_llama3v.estimate import Form, scan, volume
from mlx_llama3v.platform import machine, peak_memory

ROUNDS = 3


def generate(folder: Path, images: int, side: tuple[int, int]) -> None:
    """Photo-like JPEGs: smooth noise; equal pixels but a comment of their own each."""
    random = np.random.default_rng(0)
    small = random.integers(0, 255, (side[1] // 8, side[0] // 8, 3), np.uint8)
    picture = Image.fromarray(small).resize(side, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif.update({271: "Maker", 272: "Model", 274: 1, 306: "2026:01:01 00:00:00"})
    for i in range(images):
        made = io.BytesIO()
        if i % 50 == 0:
            picture = picture.rotate(7)
        picture.save(made, "JPEG", quality=88, exif=exif.tobytes(), comment=f"{i}")
        (folder / f"{i:06d}.jpg").write_bytes(made.getvalue())


def median(function: Callable[[], object]) -> float:
    """Seconds of the middle of a few rounds; the page cache is warm after the first."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measured(path: Path) -> dict[str, float]:
    """Rates of one form of the data."""
    found: dict[str, DataSet] = {}
    listing = median(lambda: found.update(data=read_data(path)))
    pictures = found["data"].pictures()
    rates = {"images": len(pictures), "read_data_s": listing, "locate_s": median(found["data"].pictures)}
    for threads in (1, 4):
        seconds = median(lambda threads=threads: scan(pictures, ImageConfig(), threads=threads))  # type: ignore[misc]
        rates[f"images_per_s_{threads}_threads"] = len(pictures) / seconds
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", default="640x480")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    width, height = map(int, args.side.split("x"))
    results: dict[str, object] = {"machine": machine(), "images": args.images, "side": args.side}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "folder")
        folder.mkdir()
        generate(folder, args.images, (width, height))
        forms = {"folder": folder, "tar": Path(temporary, "shard.tar")}
        with tarfile.open(forms["tar"], "w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, file.name)
        if find_spec("pyarrow"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            forms["parquet"] = Path(temporary, "rows.parquet")
            cells = [[{"bytes": file.read_bytes(), "path": file.name}] for file in sorted(folder.iterdir())]
            pq.write_table(pa.table({"images": cells}), forms["parquet"], row_group_size=100)
        for name, path in forms.items():
            results[name] = rates = measured(path)
            print(f"{name:<8}", ", ".join(f"{key} {value:,.3g}" for key, value in rates.items()), flush=True)
    sizes = {(400 + i % 1000, 300 + i): 1 for i in range(args.images)}
    form = Form(VisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14), TilingConfig())
    results["volume_s"] = median(lambda: volume(sizes, form))
    results["peak_memory"] = peak_memory()
    print(f"volume   {args.images:,} different sizes in {results['volume_s']:.3g} s; peak {peak_memory() / 1e6:.0f} MB")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

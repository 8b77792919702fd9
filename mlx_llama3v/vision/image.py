"""Pictures from files: to upright 8-bit RGB, and cut into slices.

Training folders hold everything: phone photos with an EXIF rotation, transparent PNGs, 16-bit scans, CMYK,
files that end in the middle. Every one of them either becomes the RGB picture a person would see on a white
page, or an ImageError that says in one sentence which file it was and why.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mlx_llama3v.config import ImageConfig
from mlx_llama3v.errors import ImageError
from mlx_llama3v.source import Held
from mlx_llama3v.vision.tiling import Plan, Size

Source: TypeAlias = str | Path | bytes | Held

# Of how pixels are made: raised with every change that gives a slice other ones. Stands in a store's fingerprint, so
# that `embed` never goes on in a store with pixels of another kind.
PROCESSING = 3

_TAIL = 1 << 16  # bytes at the end of a PNG in which an EXIF block behind the pixels is looked for

# What Pillow's decoders were seen to raise on broken files; they do not keep to OSError.
_DECODER_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)


def image_size(source: Source, max_pixels: int) -> Size:
    """(width, height) as `open_image` will have it, from the header alone. Raises ImageError.

    A file with a good header may still fail to decode.
    """
    with _reading(source, max_pixels) as image:
        return _turned(image, image.size)


def open_image(source: Source, max_pixels: int, need: Callable[[Size], Size] | None = None) -> Image.Image:
    """The picture as upright 8-bit RGB, transparency over white, an animation's first frame.

    Refuses pictures of more than `max_pixels` before it decodes them (Pillow's own limit stays in force above
    that). Raises ImageError for these and for everything that cannot be read whole.

    `need` is told the upright size and returns the (width, height) that the picture will be resized to: a JPEG is
    then decoded at an eighth, a quarter or half of its size, whichever still is twice that. On photos this differs
    from decoding it whole by 0.3 to 1.5 grey levels on average (tests/test_image.py), and is several times faster.
    """
    with _reading(source, max_pixels) as image:
        if need is not None:
            width, height = _turned(image, need(_turned(image, image.size)))
            if image.format == "JPEG":
                image.draft(None, (2 * width, 2 * height))
        image.load()  # once: on some broken files a second call returns silently
        if image.mode == "RGB" and not image.has_transparency_data and _orientation(image) == 1:
            return image  # most photos: no copies
        return _rgb(ImageOps.exif_transpose(image))


def cut(image: Image.Image, plan: Plan, config: ImageConfig, *, quick: bool = False) -> list[np.ndarray]:
    """The slices of an RGB picture, overview first, then tiles in reading order.

    Each is uint8 [height, width, 3]; normalised, the overview of a squash plan equals Hugging Face's SigLIP
    processor. With `quick` a picture that is split is made smaller in two steps, means over blocks and then the
    resampling proper: of the overview from at least twice its size, of the tiles (small print is read there) from one
    and a half times. Up to three grey levels away on average, two to four times as fast.
    """
    resample = Image.Resampling(config.resample)
    (w, h), rows, cols = plan.tile_px, plan.layout.rows, plan.layout.cols
    if not rows * cols:
        return [np.asarray(image.resize(plan.overview_px, resample))]
    overview = image.resize(plan.overview_px, resample, reducing_gap=2.0 if quick else None)
    whole = np.asarray(image.resize((cols * w, rows * h), resample, reducing_gap=1.5 if quick else None))
    corners = [(row * h, col * w) for row in range(rows) for col in range(cols)]
    return [np.asarray(overview), *(whole[y : y + h, x : x + w] for y, x in corners)]


def normalisation(config: ImageConfig, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """(factor, shift), each float32 [pixels * 3]: `values * factor - shift` is what the checkpoint's processor makes
    of the values 0..255 of that many pixels in a row: scaled, minus mean, over deviation of the channel.

    In rows of many pixels: array libraries take ten times as long where the last axis is 3.
    """
    mean, std = np.array(config.image_mean), np.array(config.image_std)
    factor, shift = (np.tile(values, pixels) for values in (config.rescale_factor / std, mean / std))
    return factor.astype(np.float32), shift.astype(np.float32)


def _turned(image: Image.Image, size: Size) -> Size:
    """`size` of the stored picture as it is upright, or the other way round."""
    turned = _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"  # Pillow turns a TIFF itself
    return (size[1], size[0]) if turned else size


def _orientation(image: Image.Image) -> int:
    """Of its EXIF block, 1 where that has none."""
    # PNG's own getexif decodes the picture to look behind the pixels; the general one reads the header.
    return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))


@contextmanager
def _reading(source: Source, max_pixels: int) -> Iterator[Image.Image]:
    """The opened file, size checked; whatever goes wrong inside becomes an ImageError."""
    name = named(source)
    try:
        if not isinstance(source, (str, Path, bytes)):
            source = source.read()
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{name} has {width} x {height} pixels; the limit is {max_pixels} in all.")
            if image.format == "PNG" and image.fp and "exif" not in image.info and (exif := _late_exif(image.fp)):
                image.info["exif"] = exif
            yield image
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} cannot be read as a picture: {_reason(error)}.") from error


def named(source: Source) -> str:
    """What messages call it."""
    return f"the picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _late_exif(file: IO[bytes]) -> bytes:
    """A PNG's EXIF block may follow its pixels: Pillow comes across it only once these are decoded."""
    at, end = file.tell(), file.seek(0, io.SEEK_END)
    file.seek(max(0, end - _TAIL))
    tail = file.read()
    file.seek(at)
    start = tail.rfind(b"eXIf")
    last = start + 4 + int.from_bytes(tail[max(start - 4, 0) : max(start, 0)], "big")
    if start < 4 or zlib.crc32(tail[start:last]) != int.from_bytes(tail[last : last + 4], "big"):
        return b""
    return b"Exif\0\0" + tail[start + 4 : last]


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        # Pillow's own text shows an address in memory.
        return "its content is not of a known image format (of HEIC, make a JPEG)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled to 8; Pillow's own conversion clips it to white."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    low, high = _range(image.mode, values)
    scaled = np.rint((values - low) * 255 / (high - low)).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # one grey value stands for "see-through": the white page
        scaled[values == clear] = 255
    return Image.fromarray(scaled)


def _range(mode: str, values: np.ndarray) -> tuple[float, float]:
    """What is black and what is white. 16-bit modes say it; "I" and "F" do not, so the usual ranges are tried
    from the smallest, and what fits none is stretched from its least to its greatest value."""
    if mode.startswith("I;16"):
        return 0, 65535
    least, most = float(values.min()), float(values.max())
    for top in (1, 255, 65535) if mode == "F" else (255, 65535):
        if least >= 0 and most <= top:
            return 0, top
    return least, max(most, least + 1)

"""From file to embeddings: batches, order, shapes, and the fingerprint that guards a store."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mlx_llama3v.config import ImageConfig, TilingConfig, VisionConfig
from mlx_llama3v.errors import ImageError
from mlx_llama3v.vision import families
from mlx_llama3v.vision.encode import Encoder, bucket, normalised, patchify
from mlx_llama3v.vision.families import PaddingEncoder, ScalesEncoder, StripEncoder
from mlx_llama3v.vision.siglip import VisionTower, position_table, tower_weights
from mlx_llama3v.vision.tiling import plan
from tests.hf_siglip import make_siglip

VISION = VisionConfig(32, 67, 3, 4, image_size=32, patch_size=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip"), full=False)


@pytest.fixture
def encoder(checkpoint: Path) -> Encoder:
    tower = VisionTower(VISION)
    weights = tower_weights(mx.load(str(checkpoint / "model.safetensors")))
    tower.load_weights(list(weights.items()), strict=True)
    return Encoder(tower, VISION, ImageConfig(), TilingConfig(), layer=-1)


def picture(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


SIZES = [(20, 20), (100, 40), (33, 90), (1, 300), (64, 64), (150, 31), (56, 16), (50, 30)]


@pytest.mark.parametrize(("height", "width", "patch"), [(32, 48, 8), (30, 29, 14), (14, 14, 14)])
def test_patchify_is_the_convolution(height: int, width: int, patch: int) -> None:
    """The same product as torch's convolution, pixels past the last whole patch cut off."""
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((height, width, 3)).astype(np.float32)
    kernel = rng.standard_normal((5, 3, patch, patch)).astype(np.float32)
    image = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())
    want = torch.nn.functional.conv2d(image, torch.from_numpy(kernel), stride=patch)[0].flatten(1).T.numpy()
    found = patchify(pixels, patch) @ kernel.transpose(0, 2, 3, 1).reshape(5, -1).T
    assert found.shape == want.shape
    assert np.abs(found - want).max() < 1e-4


def test_prepare_follows_the_layout(encoder: Encoder) -> None:
    for size in SIZES:
        layout, patches = encoder.prepare(picture(*size))
        assert layout == plan(*size, VISION, TilingConfig()).layout
        assert [p.shape for p in patches] == [(h * w, 8 * 8 * 3) for h, w in layout.grids]
        assert all(p.dtype == np.uint8 for p in patches)


def test_prepare_in_threads_is_the_same(encoder: Encoder) -> None:
    pictures = [picture(*size) for size in SIZES]
    with ThreadPoolExecutor(4) as pool:
        threaded = [*pool.map(encoder.prepare, pictures)]
    for source, (layout, patches) in zip(pictures, threaded, strict=True):
        assert layout == encoder.prepare(source)[0]
        assert all(map(np.array_equal, patches, encoder.prepare(source)[1]))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_batches_of_mixed_pictures_equal_one_by_one(encoder: Encoder, batch_size: int) -> None:
    prepared = [encoder.prepare(picture(*size, seed=i)) for i, size in enumerate(SIZES)]
    slices = [pair for layout, patches in prepared for pair in zip(layout.grids, patches, strict=True)]
    assert len({len(patches) for _, patches in slices}) > 2
    found = encoder.encode(slices, batch_size)
    total = sum(len(patches) for _, patches in slices)
    assert total <= encoder.rows <= total / 0.9
    for (grid, patches), embedding in zip(slices, found, strict=True):
        alone = encoder.tower(
            normalised(mx.array(patches), encoder.image)[None], position_table(encoder.tower, grid)[None]
        )[0]
        assert embedding.dtype == np.float32 and embedding.shape == (grid[0] * grid[1], 32)
        assert np.abs(embedding - np.array(alone)).max() < 1e-4


@pytest.mark.parametrize("kind", [Encoder, ScalesEncoder])
def test_parts_are_made_of_the_embeddings_of_each_slice(encoder: Encoder, kind: type[Encoder]) -> None:
    tiling = TilingConfig() if kind is Encoder else TilingConfig(mode="squash")
    encoder = kind(encoder.tower, VISION, ImageConfig(), tiling)
    slices = []
    for source in (picture(*size, seed=i) for i, size in enumerate(SIZES)):
        layout, patches = encoder.prepare(source)
        slices += zip(layout.grids, patches, strict=True)
    whole = encoder.encode(slices, 3)
    made = encoder.encode_as(lambda x: {"two": x[..., :2], "sum": x.sum(-1, keepdims=True)}, slices, 3)
    for values, parts in zip(whole, made, strict=True):
        assert parts["two"].shape == (len(values), 2) and np.array_equal(parts["two"], values[:, :2])
        np.testing.assert_allclose(parts["sum"], values.sum(-1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("vision", [VisionConfig(), VisionConfig(image_size=384, patch_size=14)], ids=str)
def test_a_tenth_of_a_batch_is_padding_at_most(vision: VisionConfig) -> None:
    """Random shapes, windows of four batches as `embed` has them; few batches are smaller for it."""
    random = np.random.default_rng(0)
    sides = np.exp(random.uniform(np.log(100), np.log(5000), (300, 2))).astype(int).tolist()
    lengths = [h * w for side in sides for h, w in plan(*side, vision, TilingConfig()).layout.grids]
    rows = count = 0
    for start in range(0, len(lengths), 64):
        window = lengths[start : start + 64]
        batches = bucket(window, 8)
        assert sorted(i for batch in batches for i in batch) == [*range(len(window))]
        for batch in batches:
            chosen = [window[i] for i in batch]
            assert 1 <= len(batch) <= 8 and sum(chosen) >= 0.9 * len(batch) * max(chosen)
            rows, count = rows + len(batch) * max(chosen), count + 1
    assert sum(lengths) > 0.97 * rows and len(lengths) / count > 7


def test_unlike_slices_get_batches_of_their_own() -> None:
    assert bucket([100, 1, 95, 50, 2, 94], 4) == [[1], [4], [3], [5, 2, 0]]
    assert bucket([7, 7, 7, 7, 7], 2) == [[0, 1], [2, 3], [4]] and bucket([], 3) == []


def test_encode_nothing(encoder: Encoder) -> None:
    assert encoder.encode([]) == []


def test_embed_joins_the_slices_in_order(encoder: Encoder) -> None:
    source = picture(100, 40)
    layout, patches = encoder.embed(source, batch_size=2)
    assert len(layout.grids) > 2 and patches.shape == (layout.patches, 32)
    _, slices = encoder.prepare(source)
    start = 0
    for pair in zip(layout.grids, slices, strict=True):
        (alone,) = encoder.encode([pair])
        assert np.abs(patches[start : start + len(alone)] - alone).max() < 1e-4
        start += len(alone)


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_squash_from_file_equals_transformers(encoder: Encoder, checkpoint: Path, layer: int) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    source = picture(77, 45)
    processor = SiglipImageProcessorPil.from_pretrained(checkpoint)
    pixels = processor(Image.open(io.BytesIO(source)), return_tensors="pt")["pixel_values"]
    reference = transformers.SiglipVisionModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        want = reference(pixels, output_hidden_states=True).hidden_states[layer][0].numpy()

    def error(layer: int, resample: int = 3) -> float:
        image = ImageConfig(resample=resample)
        squash = Encoder(encoder.tower, VISION, image, TilingConfig("squash"), layer)
        return float(np.abs(squash.embed(source).patches - want).max())

    assert error(layer) < 1e-4
    assert error(0) > 0.01 and error(layer, resample=2) > 0.01


def test_broken_picture_is_an_image_error(encoder: Encoder) -> None:
    with pytest.raises(ImageError):
        encoder.embed(b"nothing")


def test_half_precision_tower_gives_float32(encoder: Encoder) -> None:
    want = encoder.embed(picture(20, 20)).patches
    encoder.tower.set_dtype(mx.bfloat16)
    found = encoder.embed(picture(20, 20)).patches
    assert found.dtype == np.float32
    assert 0 < np.abs(found - want).max() < 0.1 * np.abs(want).max()


def test_fingerprint_names_everything_that_matters(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    base = encoder.fingerprint()
    assert json.loads(json.dumps(base)) == base
    tower = encoder.tower
    others = [
        Encoder(tower, VISION, ImageConfig(), TilingConfig(), -2),
        Encoder(tower, VISION, ImageConfig(resample=2), TilingConfig(), -1),
        Encoder(tower, VISION, ImageConfig(image_std=(0.5, 0.5, 0.4)), TilingConfig(), -1),
        Encoder(tower, VISION, ImageConfig(), TilingConfig(max_slices=4), -1),
        Encoder(tower, VISION, ImageConfig(), TilingConfig("squash"), -1),
        Encoder(tower, replace(VISION, image_size=40), ImageConfig(), TilingConfig(), -1),
    ]
    assert all(other.fingerprint() != base for other in others)
    assert Encoder(tower, VISION, ImageConfig(), TilingConfig(), -1).fingerprint() == base
    with monkeypatch.context() as patch:
        patch.setattr("mlx_llama3v.vision.encode.PROCESSING", 1)
        assert Encoder(tower, VISION, ImageConfig(), TilingConfig(), -1).fingerprint() != base
    bent = VisionTower(VISION)
    bent.update(tower.parameters())
    bias = bent.encoder.layers[1].mlp.fc1.bias
    bent.encoder.layers[1].mlp.fc1.bias = bias + mx.where(mx.arange(bias.size) == 3, 1e-3, 0.0)
    assert Encoder(bent, VISION, ImageConfig(), TilingConfig(), -1).fingerprint()["weights"] != base["weights"]


def test_the_square_around_a_long_picture_takes_no_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made of a smaller picture, which no slice tells from the whole one."""
    vision = VisionConfig(32, 64, 1, 2, image_size=64, patch_size=16)
    encoder = PaddingEncoder(VisionTower(vision), vision, ImageConfig(), TilingConfig("pad", 0))
    sizes, new = [], Image.new

    def noting(mode: str, size: tuple[int, int], *more: Any) -> Image.Image:
        sizes.append(size)
        return new(mode, size, *more)

    monkeypatch.setattr(Image, "new", noting)
    for size in ((1, 400_000), (90_000, 2)):
        new("RGB", size).save(tmp_path / "long.png")
        layout, (patches,) = encoder.prepare(tmp_path / "long.png")
        assert layout.overview == (4, 4) and patches.shape == (16, 768)
    assert max(width * height for width, height in sizes) <= families._MOST_SIDE**2
    ramp = np.linspace(0, 255, 900)[:, None, None] * np.linspace(0.2, 1, 640)[None, :, None]
    Image.fromarray(np.broadcast_to(ramp, (900, 640, 3)).astype(np.uint8)).save(tmp_path / "photo.png")
    whole = encoder.prepare(tmp_path / "photo.png")[1][0].astype(int)
    monkeypatch.setattr(families, "_MOST_SIDE", 512)
    apart = np.abs(encoder.prepare(tmp_path / "photo.png")[1][0] - whole)
    assert apart.max() <= 3 and apart.mean() < 0.2


def test_a_slice_that_no_memory_would_hold_is_refused(tmp_path: Path) -> None:
    """MiniCPM-V's slices keep a picture's shape, so one pixel by many is one patch by more than many."""
    vision = VisionConfig(32, 64, 1, 2, image_size=64, patch_size=14)
    encoder = StripEncoder(VisionTower(vision), vision, ImageConfig(), TilingConfig("minicpm", 9))
    for size, fits in (((1, 400_000), False), ((9, 3000), True)):
        Image.new("RGB", size).save(tmp_path / "long.png")
        if fits:
            encoder.prepare(tmp_path / "long.png")
            continue
        with pytest.raises(ImageError, match=r"long.png is too long: a slice of it has 20,239 patches, more"):
            encoder.prepare(tmp_path / "long.png")

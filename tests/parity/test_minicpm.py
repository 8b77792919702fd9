"""MiniCPM-Llama3-V-2.5 and llama3v: picture file in, logits out, against a reference written from the published facts.

The tower of the reference is transformers' Idefics2VisionTransformer, fed with strips as the published code does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.config import VisionConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.inference import load
from mlx_llama3v.model import Llama3V
from mlx_llama3v.tensors import parameters, read_tensors
from mlx_llama3v.vision.families import buckets, make_encoder
from mlx_llama3v.vision.siglip import VisionTower
from mlx_llama3v.vision.tiling import minicpm
from mlx_llama3v.weights.family import Source, rename
from mlx_llama3v.weights.minicpm import FAMILY
from mlx_llama3v.weights.vlm import convert_vlm
from tests import hf_family as hf
from tests.family_parity import Answered, agree, answer, gap, prompt_logits
from tests.hf_edit import copy, edit, edit_json
from tests.hf_llava import picture

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What does it say?"
QUERIES, WIDTH, SIDE, PATCH = 6, 256, 980, 14
NAMES = {"minicpmv": ("vpm.", "resampler.", "llm."), "llama3v": ("vison.", "projection.", "llm.")}
SPECIAL = ("<image>", "</image>", "<slice>", "</slice>", "<unk>")


class Resampler(torch.nn.Module):
    """As published: nn.MultiheadAttention, no positions on queries, `proj` applied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.kv_proj = torch.nn.Linear(64, WIDTH, bias=False)
        self.attn = torch.nn.MultiheadAttention(WIDTH, WIDTH // 128, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (torch.nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(3))
        self.proj = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        kv = self.ln_kv(self.kv_proj(x))
        valid = grid[0] * grid[1]
        pos = torch.zeros(x.shape[1], WIDTH)
        pos[:valid] = torch.from_numpy(sincos(*grid)).reshape(valid, WIDTH)
        pad = (torch.arange(x.shape[1]) >= valid)[None]
        out, _ = self.attn(self.ln_q(self.query)[None], kv + pos, kv, key_padding_mask=pad)
        return self.ln_post(out[0]) @ self.proj


def sincos(height: int, width: int) -> np.ndarray:
    """[h, w, WIDTH], the column in the first half."""

    def line(positions: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(WIDTH // 4) / (WIDTH / 4))
        out = positions.reshape(-1)[:, None] * omega
        return np.concatenate([np.sin(out), np.cos(out)], 1)

    cols, rows = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    return np.concatenate([line(cols), line(rows)], 1).reshape(height, width, -1).astype(np.float32)


def slices(image: Image.Image) -> tuple[list[Image.Image], tuple[int, int] | None]:
    """MiniCPM's slice_image: overview, tiles, and (columns, rows)."""

    def div(x: float, d: int) -> int:
        return max(round(x / d) * d, d)

    def best(size: tuple[float, float], up: bool) -> tuple[int, int]:
        w, h = size
        if w * h > 448 * 448 or up:
            r = w / h
            h = int(448 / math.sqrt(r))
            w = int(h * r)
        return div(w, 14), div(h, 14)

    W, H = image.size
    many = min(math.ceil(W * H / (448 * 448)), 9)
    if many <= 1:
        return [image.resize(best((W, H), True), 3)], None
    nums = [n for n in (many - 1, many, many + 1) if n not in (1,) and n <= 9]
    grids = [(m, n // m) for n in nums for m in range(1, n + 1) if n % m == 0]
    least, grid = float("inf"), (1, 1)
    for candidate in grids:
        error = abs(math.log(W / H) - math.log(candidate[0] / candidate[1]))
        if error < least:
            least, grid = error, candidate
    wide, high = div(W, grid[0]) / grid[0], div(H, grid[1]) / grid[1]
    bw, bh = best((wide, high), True)
    refined = image.resize((bw * grid[0], bh * grid[1]), 3)
    boxes = [(x * bw, y * bh, (x + 1) * bw, (y + 1) * bh) for y in range(grid[1]) for x in range(grid[0])]
    return [image.resize(best((W, H), False), 3), *(refined.crop(box) for box in boxes)], grid


class Reference:
    """A random model: parts in torch, which `write` puts under the names of either release."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(0)
        self.tokenizer, self._words = hf.make_tokenizer(directory, *SPECIAL), directory
        self._vision: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 71,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": SIDE,
            "patch_size": PATCH,
        }
        self.tower = hf.enlarge(Idefics2VisionTransformer(Idefics2VisionConfig(**self._vision)), 1.5, 1.5)
        with torch.no_grad():
            self.tower.embeddings.position_embedding.weight.normal_(0, 1)
        self.llm, self.resampler = hf.decoder(len(self.tokenizer), WIDTH), Resampler()
        with torch.no_grad():
            for name, weight in self.resampler.named_parameters():
                if "ln_" in name or name.endswith("bias"):
                    weight.add_(0.3 * torch.randn_like(weight))
        self.resampler.eval()

    def write(self, directory: Path, kind: str) -> Path:
        """The checkpoint as `kind` was released: llama3v's config.json says nothing of its tower."""
        config = hf.llama_values(self.llm, model_type=kind, query_num=QUERIES, slice_mode=True, eos_token_id=257)
        if kind == "minicpmv":
            config |= {"version": "2.5", "vision_config": {"model_type": "idefics2", **self._vision}}
            config |= {"slice_config": {"max_slice_nums": 9, "patch_size": 14}, "drop_vision_last_layer": False}
        parts = dict(zip(NAMES[kind], (self.tower, self.resampler, self.llm), strict=True))
        return hf.save(copy(self._words, directory), config, parts)

    def visual(self, images: list[Image.Image], flat: bool) -> list[torch.Tensor]:
        """Of each slice; `flat` as published, all in one batch of padded strips."""
        pixels = [hf.pixels(piece, piece.size)[0] for piece in images]
        grids = [(rows.shape[1] // PATCH, rows.shape[2] // PATCH) for rows in pixels]
        if not flat:
            hidden = [self.tower(rows[None]).last_hidden_state[0] for rows in pixels]
            return [self.resampler(rows[None], grid) for rows, grid in zip(hidden, grids, strict=True)]
        strips = []
        for rows in pixels:
            cells = torch.nn.functional.unfold(rows[None], (PATCH, PATCH), stride=(PATCH, PATCH))[0]
            strips.append(cells.reshape(3, PATCH, PATCH, -1).permute(0, 1, 3, 2).reshape(3, PATCH, -1))
        longest = max(strip.shape[-1] for strip in strips)
        batch = torch.stack([torch.nn.functional.pad(strip, (0, longest - strip.shape[-1])) for strip in strips])
        everything = torch.ones(len(images), 1, longest // PATCH, dtype=torch.bool)
        hidden = list(self.tower(batch, patch_attention_mask=everything).last_hidden_state)
        return [self.resampler(rows[None], grid) for rows, grid in zip(hidden, grids, strict=True)]

    @torch.no_grad()
    def answer(self, path: Path, flat: bool = True) -> Answered:
        images, grid = slices(Image.open(path).convert("RGB"))
        vectors = self.visual(images, flat)
        one = "<image>" + "<unk>" * QUERIES + "</image>"
        held = one
        if grid:
            held += "<slice>" + "\n".join([one * grid[0]] * grid[1]) + "</slice>"
        text = f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{held}\n{QUESTION}<|eot_id|>"
        ids = hf.ids(self.tokenizer, text + "<|start_header_id|>assistant<|end_header_id|>\n\n")
        pieces: list[torch.Tensor] = []
        runs = groupby(ids.tolist(), key=self.tokenizer.convert_tokens_to_ids("<unk>").__eq__)
        for shown, run in runs:
            pieces.append(vectors.pop(0) if shown else torch.tensor(list(run)))
        return hf.decode(self.llm, self.tokenizer, pieces, 4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def checkpoints(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("released")
    return {kind: reference.write(folder / f"a-folder-{n}", kind) for n, kind in enumerate(NAMES)}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    return {kind: convert_vlm(source, folder / kind).path for kind, source in checkpoints.items()}


@pytest.mark.parametrize("size", [(470, 440), (50, 41), (330, 900)])
def test_logits_and_greedy_answer(
    size: tuple[int, int], reference: Reference, models: dict[str, Path], tmp_path: Path
) -> None:
    image = picture(tmp_path / "a.png", *size)
    agree(answer(models["minicpmv"], image, QUESTION, 4), reference.answer(image))


def test_both_releases_are_one_model(models: dict[str, Path]) -> None:
    """llama3v has MiniCPM-Llama3-V 2.5's tensors under other names, and no configuration of its tower."""
    ours = [read_tensors(models[kind]) for kind in ("minicpmv", "llama3v")]
    assert ours[0].keys() == ours[1].keys()
    assert all(mx.array_equal(value, ours[1][name]).item() for name, value in ours[0].items())
    configs = [replace(load_config(models[kind]), sources={}) for kind in ("minicpmv", "llama3v")]
    assert configs[0] == configs[1]
    assert {load_config(path).sources["family"] for path in models.values()} == {"minicpm-v-2.5"}


@pytest.mark.parametrize("size", [(470, 440), (60, 23)])
def test_the_2d_option(
    size: tuple[int, int], reference: Reference, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """`--vision-mode strip-2d` against the tower with true grids, each slice alone: logits and answer."""
    config = convert_vlm(checkpoints["llama3v"], tmp_path / "model", vision_mode="strip-2d").config
    assert config.vision_mode == "strip-2d"
    image = picture(tmp_path / "a.png", *size)
    expected = reference.answer(image, flat=False)
    agree(answer(tmp_path / "model", image, QUESTION, 4), expected)
    assert gap(reference.answer(image).logits, expected.logits) > 1e-2  # the published strip is another model


def test_a_perturbed_weight_and_the_other_mode_show(
    reference: Reference, models: dict[str, Path], tmp_path: Path
) -> None:
    """Trap 7: true 2-D positions are another model than the published strip; and a moved weight is felt."""
    image = picture(tmp_path / "a.png", 50, 41)
    session = load(models["minicpmv"])
    assert session.encoder is not None
    strip = session.encoder.embed(image).patches
    flat = make_encoder(session.encoder.tower, replace(session.model.config, vision_mode="strip-2d")).embed(image)
    assert flat.patches.shape == strip.shape and np.abs(flat.patches - strip).max() > 0.1
    name = "projector.body.ln_kv.bias"
    spoilt = edit(copy(models["minicpmv"], tmp_path / "m"), lambda w: w.update({name: w[name] + 0.3}))
    assert gap(prompt_logits(load(spoilt), image, QUESTION), reference.answer(image).logits) > 1e-3


def test_every_name_of_llama3v_is_mapped() -> None:
    """The 741 names of the published index: 291 of the decoder, 437 of the tower, 13 of the resampler."""
    norms = [f"{n}.{p}" for n in ("ln_q", "ln_kv", "ln_post") for p in ("weight", "bias")]
    attention = ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"]
    names = [f"projection.{n}" for n in ("query", "proj", "kv_proj.weight", *attention, *norms)]
    embeddings = ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")
    names += [f"vison.embeddings.{n}" for n in embeddings] + [f"vison.post_layernorm.{p}" for p in ("weight", "bias")]
    block = [f"{m}.{p}" for m in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")]
    block += [f"self_attn.{m}_proj.{p}" for m in ("q", "k", "v", "out") for p in ("weight", "bias")]
    names += [f"vison.encoder.layers.{n}.{part}" for n in range(27) for part in block]
    names += ["llm.model.embed_tokens.weight", "llm.model.norm.weight", "llm.lm_head.weight"]
    layer = [f"self_attn.{m}_proj.weight" for m in "qkvo"] + [f"mlp.{m}_proj.weight" for m in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names += [f"llm.model.layers.{n}.{part}" for n in range(32) for part in layer]
    assert len(names) == 741
    found = rename(FAMILY, names)
    assert not found.unknown and not found.skipped
    from mlx_llama3v.config import ModelConfig, ProjectorConfig, llama_config

    small = {"hidden_size": 128, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    config = ModelConfig(
        VisionConfig(72, 8, 27, 1, image_size=28, patch_size=14, vision_use_head=False),
        llama_config({**small, "num_hidden_layers": 32}),
        ProjectorConfig("resampler", 72, 128, num_heads=1, queries=2),
    )
    ours = {f"vision_tower.{name}" for name in parameters(VisionTower(config.vision_config))}
    assert set(found.names.values()) == (ours | set(parameters(Llama3V(config)))) - {"projector.markers"}


# (width, height) -> overview, (columns, rows), slice, in patches; from reference/checkpoints.md d.2
TABLE = {
    (1, 1): ((32, 32), None, None),
    (5, 3): ((41, 25), None, None),
    (449, 448): ((32, 32), (2, 1), (23, 45)),
    (448, 449): ((32, 32), (1, 2), (45, 23)),
    (640, 480): ((37, 28), (2, 1), (26, 39)),
    (800, 600): ((37, 28), (2, 2), (37, 28)),
    (896, 448): ((45, 23), (2, 1), (32, 32)),
    (1344, 1344): ((32, 32), (3, 3), (32, 32)),
    (1920, 1080): ((43, 24), (4, 2), (30, 34)),
    (3000, 500): ((78, 13), (7, 1), (30, 34)),
    (10000, 10): ((1000, 1), None, None),
    (10, 10000): ((1, 1012), None, None),
    (20000, 100): ((443, 2), (9, 1), (151, 7)),
    (300000, 1): ((1, 1), (3, 1), (7143, 1)),
}


@pytest.mark.parametrize("size", TABLE)
def test_the_published_grids(size: tuple[int, int]) -> None:
    overview, grid, tile = TABLE[size]
    layout = minicpm(*size, 14, 9).layout
    assert layout.overview == overview[::-1]
    assert (layout.cols, layout.rows) == (grid or (0, 0))
    if tile:
        assert layout.tile == tile[::-1]


def test_buckets_are_idefics_2s() -> None:
    """float32 decides: 1036 patches differ from the exact floor at six places."""
    floor = np.arange(1036) * 70 // 1036
    assert (buckets(1036, 70) != floor).sum() == 6
    assert (buckets(1024, 70) == np.arange(1024) * 70 // 1024).all()


def test_other_versions_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = copy(checkpoints["minicpmv"], tmp_path / "hf")
    edit_json(other / "config.json", version="2.6")
    assert not FAMILY.detect(Source.open(other))
    with pytest.raises(CheckpointError, match="minicpmv"):
        convert_vlm(other, tmp_path / "model")

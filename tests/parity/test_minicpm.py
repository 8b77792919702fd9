"""MiniCPM-Llama3-V-2.5 and llama3v: picture file in, logits out, against a reference written from the published facts.

The tower of the reference is transformers' Idefics2VisionTransformer, fed with strips as the published code does.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from mlx_llama3v.config import VisionConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.inference import load
from mlx_llama3v.model import Llama3V
from mlx_llama3v.tensors import parameters
from mlx_llama3v.vision.families import buckets, make_encoder
from mlx_llama3v.vision.siglip import VisionTower
from mlx_llama3v.vision.tiling import minicpm
from mlx_llama3v.weights.family import Source, rename
from mlx_llama3v.weights.minicpm import FAMILY
from mlx_llama3v.weights.vlm import convert_vlm
from tests import hf_family as hf
from tests.family_parity import answer, gap
from tests.hf_edit import edit, edit_json
from tests.hf_llava import picture

QUESTION = "What does it say?"
QUERIES, WIDTH, SIDE, PATCH = 6, 256, 980, 14
NAMES = {"minicpmv": ("vpm.", "resampler.", "llm."), "llama3v": ("vison.", "projection.", "llm.")}
SPECIAL = ("<image>", "</image>", "<slice>", "</slice>", "<unk>")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


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
    """A random model under the names of `kind`; its checkpoint in `directory`."""

    def __init__(self, directory: Path, kind: str) -> None:
        torch.manual_seed(0)
        self.tokenizer = hf.make_tokenizer(directory, *SPECIAL)
        settings: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 71,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": SIDE,
            "patch_size": PATCH,
        }
        self.tower = hf.enlarge(Idefics2VisionTransformer(Idefics2VisionConfig(**settings)), 1.5, 1.5)
        with torch.no_grad():
            self.tower.embeddings.position_embedding.weight.normal_(0, 1)
        self.llm, self.resampler = hf.decoder(len(self.tokenizer), WIDTH), Resampler()
        with torch.no_grad():
            for name, weight in self.resampler.named_parameters():
                if "ln_" in name or name.endswith("bias"):
                    weight.add_(0.3 * torch.randn_like(weight))
        self.resampler.eval()
        config = hf.llama_values(self.llm, model_type=kind, query_num=QUERIES, slice_mode=True, eos_token_id=257)
        if kind == "minicpmv":
            config |= {"version": "2.5", "vision_config": {"model_type": "idefics2", **settings}}
            config |= {"slice_config": {"max_slice_nums": 9, "patch_size": 14}, "drop_vision_last_layer": False}
        parts = dict(zip(NAMES[kind], (self.tower, self.resampler, self.llm), strict=True))
        hf.save(directory, config, parts)

    def visual(self, images: list[Image.Image]) -> list[torch.Tensor]:
        strips, grids = [], []
        for piece in images:
            pixels = hf.pixels(piece, piece.size)[0]
            grids.append((pixels.shape[1] // PATCH, pixels.shape[2] // PATCH))
            cells = torch.nn.functional.unfold(pixels[None], (PATCH, PATCH), stride=(PATCH, PATCH))[0]
            strips.append(cells.reshape(3, PATCH, PATCH, -1).permute(0, 1, 3, 2).reshape(3, PATCH, -1))
        longest = max(strip.shape[-1] for strip in strips)
        batch = torch.stack([torch.nn.functional.pad(strip, (0, longest - strip.shape[-1])) for strip in strips])
        everything = torch.ones(len(images), 1, longest // PATCH, dtype=torch.bool)
        hidden = self.tower(batch, patch_attention_mask=everything).last_hidden_state
        return [self.resampler(rows[None], grid) for rows, grid in zip(hidden, grids, strict=True)]

    @torch.no_grad()
    def answer(self, path: Path) -> tuple[np.ndarray, list[int]]:
        images, grid = slices(Image.open(path).convert("RGB"))
        vectors = self.visual(images)
        one = "<image>" + "<unk>" * QUERIES + "</image>"
        held = one
        if grid:
            held += "<slice>" + "\n".join([one * grid[0]] * grid[1]) + "</slice>"
        text = f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{held}\n{QUESTION}<|eot_id|>"
        ids = hf.ids(self.tokenizer, text + "<|start_header_id|>assistant<|end_header_id|>\n\n")
        inputs = self.llm.get_input_embeddings()(ids)
        inputs[ids == self.tokenizer.convert_tokens_to_ids("<unk>")] = torch.cat(vectors)
        stop = frozenset(self.tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]))
        return hf.decode(self.llm, inputs[None], stop, 4)


@pytest.mark.parametrize(("kind", "size"), [("minicpmv", (470, 440)), ("llama3v", (50, 41)), ("llama3v", (330, 900))])
def test_logits_and_greedy_answer(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    reference = Reference(tmp_path / "hf", kind)
    report = convert_vlm(tmp_path / "hf", tmp_path / "model")
    assert report.config.sources["family"] == "minicpm-v-2.5"
    image = picture(tmp_path / "a.png", *size)
    expected, tokens = reference.answer(image)
    found, ours = answer(tmp_path / "model", image, QUESTION, 4)
    assert found.shape == expected.shape
    assert gap(found, expected) <= 1e-4
    assert ours == tokens


def test_a_perturbed_weight_and_the_other_mode_show(tmp_path: Path) -> None:
    """Trap 7: true 2-D positions are another model than the published strip; and a moved weight is felt."""
    reference = Reference(tmp_path / "hf", "minicpmv")
    config = convert_vlm(tmp_path / "hf", tmp_path / "model").config
    image = picture(tmp_path / "a.png", 470, 440)
    expected, _ = reference.answer(image)
    session = load(tmp_path / "model")
    assert session.encoder is not None
    strip = session.encoder.embed(image).patches
    flat = make_encoder(session.encoder.tower, replace(config, vision_mode="strip-2d")).embed(image).patches
    assert flat.shape == strip.shape and np.abs(flat - strip).max() > 0.1
    name = "projector.body.ln_kv.bias"
    edit(tmp_path / "model", lambda weights: weights.update({name: weights[name] + 0.3}))
    assert gap(answer(tmp_path / "model", image, QUESTION, 1)[0], expected) > 1e-3


def test_2d_mode_is_idefics_2(tmp_path: Path) -> None:
    """`strip-2d` against the tower with a true grid."""
    reference = Reference(tmp_path / "hf", "minicpmv")
    config = convert_vlm(tmp_path / "hf", tmp_path / "model").config
    image = picture(tmp_path / "a.png", 50, 41)
    encoder = load(tmp_path / "model").encoder
    assert encoder is not None
    found = make_encoder(encoder.tower, replace(config, vision_mode="strip-2d")).embed(image).patches
    piece = slices(Image.open(image).convert("RGB"))[0][0]
    with torch.no_grad():
        expected = reference.tower(hf.pixels(piece, piece.size)).last_hidden_state[0].numpy()
    assert gap(found, expected) <= 1e-4


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


def test_other_versions_are_refused(tmp_path: Path) -> None:
    Reference(tmp_path / "hf", "minicpmv")
    edit_json(tmp_path / "hf" / "config.json", version="2.6")
    assert not FAMILY.detect(Source.open(tmp_path / "hf"))
    with pytest.raises(CheckpointError, match="minicpmv"):
        convert_vlm(tmp_path / "hf", tmp_path / "model")

"""Bunny 1.0 and 1.1 with Llama-3: picture file in, logits out, against a reference written from the published facts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mlx_llama3v.inference import load
from mlx_llama3v.weights.vlm import convert_vlm
from tests import hf_family as hf
from tests.family_parity import answer, gap
from tests.hf_edit import edit
from tests.hf_llava import picture

QUESTION = "What does it say?"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SIDE = 35  # with patches of 8: 4 x 4 of them, three pixels are cut off


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Reference:
    """A random Bunny: parts in torch, its checkpoint in `directory`."""

    def __init__(self, directory: Path, scales: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.tokenizer = hf.make_tokenizer(directory)
        self.scales = scales
        self.tower = hf.tower(image=SIDE)
        self.llm = hf.decoder(len(self.tokenizer))
        self.projector = hf.mlp(64 * len(scales), 64)
        config = hf.llama_values(
            self.llm,
            architectures=["BunnyLlamaForCausalLM"],
            model_type="bunny-llama",
            mm_vision_tower=f"google/siglip-tiny-patch8-{SIDE}",
            mm_projector_type="mlp2x_gelu",
            mm_hidden_size=64 * len(scales),
            image_aspect_ratio="pad",
            eos_token_id=self.tokenizer.convert_tokens_to_ids("<|end_of_text|>"),
        )
        parts = {"": self.llm, "model.mm_projector.": self.projector}
        hf.save(directory, config, {**parts, "model.vision_tower.vision_tower.vision_model.": self.tower})

    def features(self, image: Path) -> torch.Tensor:
        source = Image.open(image).convert("RGB")
        side = max(source.size)
        square = Image.new("RGB", (side, side), (127, 127, 127))
        square.paste(source, ((side - source.width) // 2, (side - source.height) // 2))
        if len(self.scales) == 1:
            return self.run(hf.pixels(square, (SIDE, SIDE)))[0]
        whole = hf.pixels(square, (3 * SIDE, 3 * SIDE))
        found = []
        for scale in self.scales:
            scaled = F.interpolate(whole, size=(scale * SIDE,) * 2, mode="bicubic", align_corners=False)
            rows = []
            for band in scaled.chunk(scale, dim=2):
                tiles = [self.run(tile) for tile in band.chunk(scale, dim=3)]
                rows.append(torch.cat([tile.transpose(1, 2).reshape(1, -1, 4, 4) for tile in tiles], dim=3))
            stitched = torch.cat(rows, dim=2)
            found.append(F.interpolate(stitched, size=(4, 4), mode="area"))
        return torch.cat(found, dim=1).flatten(2).transpose(1, 2)[0]

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.tower(pixels, output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def answer(self, image: Path) -> tuple[np.ndarray, list[int]]:
        pieces = [
            hf.ids(self.tokenizer, f"<|begin_of_text|>{SYSTEM} USER: "),
            self.projector(self.features(image)),
            hf.ids(self.tokenizer, f"\n{QUESTION} ASSISTANT:"),
        ]
        stop = frozenset(self.tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]))
        return hf.decode(self.llm, hf.join(self.llm, pieces), stop)


@pytest.mark.parametrize("scales", [(1,), (1, 2, 3)])
@pytest.mark.parametrize("size", [(50, 41), (23, 64)])
def test_logits_and_greedy_answer(scales: tuple[int, ...], size: tuple[int, int], tmp_path: Path) -> None:
    reference = Reference(tmp_path / "hf", scales)
    report = convert_vlm(tmp_path / "hf", tmp_path / "model")
    assert report.config.sources["family"] == "bunny"
    image = picture(tmp_path / "a.png", *size)
    expected, tokens = reference.answer(image)
    found, ours = answer(tmp_path / "model", image, QUESTION)
    assert found.shape == expected.shape
    assert gap(found, expected) <= 1e-4
    assert ours == tokens


def test_the_tuned_tower_is_the_one_in_the_file(tmp_path: Path) -> None:
    """Twin: one moved weight of the tower is felt."""
    reference = Reference(tmp_path / "hf", (1, 2, 3))
    convert_vlm(tmp_path / "hf", tmp_path / "model")
    name = "vision_tower.encoder.layers.1.self_attn.out_proj.bias"
    edit(tmp_path / "model", lambda weights: weights.update({name: weights[name] + 0.2}))
    image = picture(tmp_path / "a.png")
    assert gap(answer(tmp_path / "model", image, QUESTION)[0], reference.answer(image)[0]) > 1e-3


def test_the_prompt_is_vicunas(tmp_path: Path) -> None:
    """Trap 8: neither headers nor <|eot_id|>; the second turn follows <|end_of_text|> at once."""
    from mlx_llama3v.text.prompt import Message, render

    Reference(tmp_path / "hf", (1,))
    convert_vlm(tmp_path / "hf", tmp_path / "model")
    session = load(tmp_path / "model")
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    row = render(messages, [], session.tokens, session.model.config.projector_config, generate=True)
    text = session.tokens.decode(row.ids, special=True)
    assert text == f"<|begin_of_text|>{SYSTEM} USER: a ASSISTANT: b<|end_of_text|>USER: c ASSISTANT:"
    trained = session.tokens.decode(row.ids[row.supervised], special=True)
    assert trained == " b<|end_of_text|>"

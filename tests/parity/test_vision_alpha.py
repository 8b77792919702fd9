"""llama-3-vision-alpha-hf: picture file in, logits out, against a reference written from the published facts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from mlx_llama3v.weights.vlm import convert_vlm
from tests import hf_family as hf
from tests.family_parity import agree, answer, gap
from tests.hf_edit import edit
from tests.hf_llava import picture

QUESTION = "What does it say?"


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("prefix", ["mm_projector.model.", "model.mm_projector."])
def test_logits_and_greedy_answer(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = hf.make_tokenizer(tmp_path / "hf")
    tower, llm, projector = hf.tower(), hf.decoder(len(tokenizer)), hf.mlp(64, 64)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    config = {"model_type": "llamavision", "text_config": hf.llama_values(llm, model_type="llama", eos_token_id=eot)}
    parts = {"text_model.": llm, "vision_model.vision_model.": tower, prefix: projector}
    hf.save(tmp_path / "hf", config, parts)
    image = picture(tmp_path / "a.png")
    with torch.no_grad():
        pixels = hf.pixels(Image.open(image).convert("RGB"), (32, 32))
        visual = projector(tower(pixels, output_hidden_states=True).hidden_states[-2][0])
        head = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        tail = f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    expected = hf.decode(llm, tokenizer, [hf.ids(tokenizer, head), visual, hf.ids(tokenizer, tail)])
    assert convert_vlm(tmp_path / "hf", tmp_path / "model").config.sources["family"] == "vision-alpha"
    agree(answer(tmp_path / "model", image, QUESTION), expected)
    name = "projector.body.linear_2.bias"
    edit(tmp_path / "model", lambda weights: weights.update({name: weights[name] + 0.2}))
    assert gap(answer(tmp_path / "model", image, QUESTION)[0], expected.logits) > 1e-3

"""llama-3-vision-alpha-hf: picture file in, logits out, against a reference written from the published facts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mlx_llama3v.weights.vlm import convert_vlm
from tests import hf_family as hf
from tests.family_parity import Answered, agree, answer, gap
from tests.hf_edit import edit
from tests.hf_llava import picture

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What does it say?"


class Reference:
    """A random model: parts in torch, its checkpoint in `directory`, the projector's names behind `prefix`."""

    def __init__(self, directory: Path, prefix: str = "mm_projector.model.") -> None:
        torch.manual_seed(0)
        self.tokenizer = hf.make_tokenizer(directory)
        self.tower, self.llm, self.projector = hf.tower(), hf.decoder(len(self.tokenizer)), hf.mlp(64, 64)
        eot = self.tokenizer.convert_tokens_to_ids("<|eot_id|>")
        text = hf.llama_values(self.llm, model_type="llama", eos_token_id=eot)
        parts = {"text_model.": self.llm, "vision_model.vision_model.": self.tower, prefix: self.projector}
        hf.save(directory, {"model_type": "llamavision", "text_config": text}, parts)

    @torch.no_grad()
    def answer(self, image: Path) -> Answered:
        pixels = hf.pixels(Image.open(image).convert("RGB"), (32, 32))
        visual = self.projector(self.tower(pixels, output_hidden_states=True).hidden_states[-2][0])
        head = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        tail = f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        pieces = [hf.ids(self.tokenizer, head), visual, hf.ids(self.tokenizer, tail)]
        return hf.decode(self.llm, self.tokenizer, pieces)


@pytest.mark.parametrize("prefix", ["mm_projector.model.", "model.mm_projector."])
def test_logits_and_greedy_answer(prefix: str, tmp_path: Path) -> None:
    reference, image = Reference(tmp_path / "hf", prefix), picture(tmp_path / "a.png")
    assert convert_vlm(tmp_path / "hf", tmp_path / "model").config.sources["family"] == "vision-alpha"
    expected = reference.answer(image)
    agree(answer(tmp_path / "model", image, QUESTION), expected)
    name = "projector.body.linear_2.bias"
    edit(tmp_path / "model", lambda weights: weights.update({name: weights[name] + 0.2}))
    assert gap(answer(tmp_path / "model", image, QUESTION).logits, expected.logits) > 1e-3

"""VILA 1.5 with Llama-3: picture file in, logits out, against a reference written from the published facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.weights.vlm import convert_vlm
from tests import hf_family as hf
from tests.family_parity import Answered, agree, answer, gap
from tests.hf_edit import copy, edit, edit_json
from tests.hf_llava import picture

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What does it say?"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def flat_square(x: torch.Tensor) -> torch.Tensor:
    """[1, h, w, c] -> [1, blocks, 4c]; odd sides are padded with zeros; no transpose back at the end."""
    _, h, w, c = x.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, w % 2, 0, h % 2))
    h, w = h + h % 2, w + w % 2
    x = x.reshape(1, h, w // 2, 2 * c).permute(0, 2, 1, 3).contiguous()
    return x.reshape(1, w // 2, h // 2, 4 * c).reshape(1, -1, 4 * c)


class Reference:
    """A random VILA: parts in torch, its three checkpoints in sub-folders of `directory`."""

    def __init__(self, directory: Path, side: int = 32) -> None:
        torch.manual_seed(0)
        self.directory, self.side = directory, side
        self.tokenizer = hf.make_tokenizer(directory / "llm")
        self.tower, self.llm = hf.tower(image=side), hf.decoder(len(self.tokenizer))
        linear = torch.nn.Linear
        self.projector = torch.nn.Sequential(
            torch.nn.Identity(), torch.nn.LayerNorm(256), linear(256, 64), torch.nn.GELU(), linear(64, 64)
        )
        hf.enlarge(self.projector, 4)
        values = {"model_type": "llava_llama", "mm_vision_select_layer": -2}
        (directory / "config.json").write_text(json.dumps(values))
        end = self.tokenizer.convert_tokens_to_ids("<|end_of_text|>")
        hf.save(directory / "llm", hf.llama_values(self.llm, model_type="llama", eos_token_id=end), {"": self.llm})
        vision = {**self.tower.config.to_dict(), "model_type": "siglip_vision_model"}
        hf.save(directory / "vision_tower", vision, {"vision_model.": self.tower})
        hf.save(directory / "mm_projector", {"model_type": "v2l_projector"}, {"layers.": self.projector})

    @torch.no_grad()
    def answer(self, image: Path, layout: str | None) -> Answered:
        pixels = hf.pixels(Image.open(image).convert("RGB"), (self.side, self.side))
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        grid = self.side // 8
        visual = self.projector(flat_square(hidden.reshape(1, grid, grid, -1)))[0]

        def header(role: str) -> str:
            return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

        close, role = ("<|eot_id|>", "assistant") if layout else ("<|end_of_text|>", "system")
        before = f"<|begin_of_text|>{header('system')}{SYSTEM}{close}{header('user')}"
        after = f"\n{QUESTION}{close}{header(role)}"
        pieces = [hf.ids(self.tokenizer, before), visual, hf.ids(self.tokenizer, after)]
        return hf.decode(self.llm, self.tokenizer, pieces)


@pytest.mark.parametrize("layout", [None, "vila-llama3"])
@pytest.mark.parametrize("side", [32, 41])  # 4 x 4 and 5 x 5 patches
def test_logits_and_greedy_answer(side: int, layout: str | None, tmp_path: Path) -> None:
    reference, image = Reference(tmp_path / "hf", side), picture(tmp_path / "a.png")
    report = convert_vlm(reference.directory, tmp_path / "model", prompt_layout=layout)
    assert report.config.sources["family"] == "vila"
    expected = reference.answer(image, layout)
    agree(answer(tmp_path / "model", image, QUESTION), expected)
    edit(tmp_path / "model", lambda w: w.update({"projector.body.norm.bias": w["projector.body.norm.bias"] + 0.2}))
    assert gap(answer(tmp_path / "model", image, QUESTION).logits, expected.logits) > 1e-3


def test_the_grid_is_transposed() -> None:
    """Token 1 covers rows 2-3 and columns 0-1, in the reference above and in the production projector."""
    import mlx.core as mx
    import numpy as np

    from mlx_llama3v.resampler import Downsample

    cells = torch.arange(16.0).reshape(1, 4, 4, 1)
    assert flat_square(cells)[0, 1].tolist() == [8, 9, 12, 13]
    at = [mx.array([[value]]) for value in (2, 0, 4, 4)]
    patches = mx.array(np.arange(16, dtype=np.float32).reshape(1, 16, 1))
    assert Downsample._at(patches, *at).item() == 8


def test_later_vilas_are_not_taken_for_this_one(tmp_path: Path) -> None:
    """Their tensors have the same names: mlp_downsample_2x2_fix does not transpose, dynamic pictures are tiled."""
    Reference(tmp_path / "hf")
    for file, values in (
        ("mm_projector/config.json", {"mm_projector_type": "mlp_downsample_2x2_fix"}),
        ("config.json", {"image_aspect_ratio": "dynamic"}),
    ):
        other = copy(tmp_path / "hf", tmp_path / next(iter(values)))
        edit_json(other / file, **values)
        with pytest.raises(CheckpointError, match=f"{next(iter(values))} is '{next(iter(values.values()))}'; expected"):
            convert_vlm(other, tmp_path / "model")
    edit_json(tmp_path / "hf" / "mm_projector" / "config.json", mm_projector_type="mlp_downsample")
    edit_json(tmp_path / "hf" / "config.json", image_aspect_ratio="resize")
    convert_vlm(tmp_path / "hf", tmp_path / "model")

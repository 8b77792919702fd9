"""VILA 1.5 with Llama-3: picture file in, logits out, against a reference written from the published facts."""

from __future__ import annotations

import json
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
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def flat_square(x: torch.Tensor) -> torch.Tensor:
    """[1, h, w, c] -> [1, blocks, 4c]; odd sides are padded with zeros; no transpose back at the end."""
    _, h, w, c = x.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, w % 2, 0, h % 2))
    h, w = h + h % 2, w + w % 2
    x = x.reshape(1, h, w // 2, 2 * c).permute(0, 2, 1, 3).contiguous()
    return x.reshape(1, w // 2, h // 2, 4 * c).reshape(1, -1, 4 * c)


@pytest.mark.parametrize("layout", [None, "vila-llama3"])
@pytest.mark.parametrize("side", [32, 41])  # 4 x 4 and 5 x 5 patches
def test_logits_and_greedy_answer(side: int, layout: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    root = tmp_path / "hf"
    tokenizer = hf.make_tokenizer(root / "llm")
    tower, llm = hf.tower(image=side), hf.decoder(len(tokenizer))
    linear = torch.nn.Linear
    projector = torch.nn.Sequential(
        torch.nn.Identity(), torch.nn.LayerNorm(256), linear(256, 64), torch.nn.GELU(), linear(64, 64)
    )
    hf.enlarge(projector, 4)
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_select_layer": -2}))
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    hf.save(root / "llm", hf.llama_values(llm, model_type="llama", eos_token_id=end), {"": llm})
    vision = {**tower.config.to_dict(), "model_type": "siglip_vision_model"}
    hf.save(root / "vision_tower", vision, {"vision_model.": tower})
    hf.save(root / "mm_projector", {"model_type": "v2l_projector"}, {"layers.": projector})
    image = picture(tmp_path / "a.png")
    with torch.no_grad():
        pixels = hf.pixels(Image.open(image).convert("RGB"), (side, side))
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
        grid = side // 8
        visual = projector(flat_square(hidden.reshape(1, grid, grid, -1)))[0]

        def header(role: str) -> str:
            return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

        close, role = ("<|eot_id|>", "assistant") if layout else ("<|end_of_text|>", "system")
        before = f"<|begin_of_text|>{header('system')}{SYSTEM}{close}{header('user')}"
        after = f"\n{QUESTION}{close}{header(role)}"
    expected = hf.decode(llm, tokenizer, [hf.ids(tokenizer, before), visual, hf.ids(tokenizer, after)])
    report = convert_vlm(root, tmp_path / "model", prompt_layout=layout)
    assert report.config.sources["family"] == "vila"
    agree(answer(tmp_path / "model", image, QUESTION), expected)
    edit(tmp_path / "model", lambda w: w.update({"projector.body.norm.bias": w["projector.body.norm.bias"] + 0.2}))
    assert gap(answer(tmp_path / "model", image, QUESTION)[0], expected.logits) > 1e-3


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

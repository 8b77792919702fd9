"""Bunny 1.0 and 1.1 with Llama-3: picture file in, logits out, against a reference written from the published facts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.inference import load
from mlx_llama3v.weights.vlm import convert_vlm
from tests import hf_family as hf
from tests.family_parity import Answered, agree, answer, gap
from tests.hf_edit import copy, edit
from tests.hf_llava import picture

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What does it say?"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SIDE = 35  # with patches of 8: 4 x 4 of them, three pixels are cut off


class Reference:
    """A random Bunny: parts in torch, its checkpoint in `directory`."""

    def __init__(self, directory: Path, scales: tuple[int, ...]) -> None:
        self.directory = directory
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
        self.config = config
        self.write(directory)

    def write(self, directory: Path) -> Path:
        parts = {"": self.llm, "model.mm_projector.": self.projector}
        return hf.save(directory, self.config, {**parts, "model.vision_tower.vision_tower.vision_model.": self.tower})

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
    def answer(self, image: Path) -> Answered:
        pieces = [
            hf.ids(self.tokenizer, f"<|begin_of_text|>{SYSTEM} USER: "),
            self.projector(self.features(image)),
            hf.ids(self.tokenizer, f"\n{QUESTION} ASSISTANT:"),
        ]
        return hf.decode(self.llm, self.tokenizer, pieces)


SCALES = {"1.0": (1,), "1.1": (1, 2, 3)}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("released")
    return {version: Reference(folder / f"folder-{len(scales)}", scales) for version, scales in SCALES.items()}


@pytest.fixture(scope="module")
def models(references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    return {version: convert_vlm(it.directory, folder / version).path for version, it in references.items()}


@pytest.mark.parametrize("version", SCALES)
@pytest.mark.parametrize("size", [(50, 41), (23, 64)])
def test_logits_and_greedy_answer(
    version: str, size: tuple[int, int], references: dict[str, Reference], models: dict[str, Path], tmp_path: Path
) -> None:
    assert load_config(models[version]).sources["family"] == "bunny"
    image = picture(tmp_path / "a.png", *size)
    agree(answer(models[version], image, QUESTION), references[version].answer(image))


@pytest.mark.parametrize("scale", SCALES["1.1"])
def test_what_one_scale_of_version_11_is(
    scale: int, references: dict[str, Reference], models: dict[str, Path], tmp_path: Path
) -> None:
    """1.1 whose projector looks at the native scale alone is 1.0, on a picture that every way of resizing leaves."""
    single, many = references["1.0"], Reference(tmp_path / "hf", SCALES["1.1"])
    with torch.no_grad():
        many.projector.load_state_dict({**single.projector.state_dict(), "0.weight": torch.zeros(64, 3 * 64)})
        many.projector[0].weight[:, 64 * (scale - 1) : 64 * scale] = single.projector[0].weight
    for mine, other in ((many.tower, single.tower), (many.llm, single.llm)):
        mine.load_state_dict(other.state_dict())
    convert_vlm(many.write(tmp_path / "hf"), tmp_path / "model")
    plain = tmp_path / "a.png"
    Image.new("RGB", (40, 40), (200, 40, 90)).save(plain)
    one, three = (load_config(path) for path in (models["1.0"], tmp_path / "model"))
    assert (one.vision_mode, three.vision_mode) == ("native", "s2")
    assert one.prompt_layout == three.prompt_layout and one.vision_config == three.vision_config
    found, expected = (answer(path, plain, QUESTION) for path in (tmp_path / "model", models["1.0"]))
    if scale == 1:
        agree(found, expected)
    else:
        assert found.ids == expected.ids and gap(found.logits, expected.logits) > 1e-3


def test_the_tuned_tower_is_the_one_in_the_file(
    references: dict[str, Reference], models: dict[str, Path], tmp_path: Path
) -> None:
    """Twin: one moved weight of the tower is felt."""
    name = "vision_tower.encoder.layers.1.self_attn.out_proj.bias"
    spoilt = edit(copy(models["1.1"], tmp_path / "model"), lambda w: w.update({name: w[name] + 0.2}))
    image = picture(tmp_path / "a.png")
    assert gap(answer(spoilt, image, QUESTION).logits, references["1.1"].answer(image).logits) > 1e-3


def test_the_prompt_is_vicunas(models: dict[str, Path]) -> None:
    """Trap 8: neither headers nor <|eot_id|>; the second turn follows <|end_of_text|> at once."""
    from mlx_llama3v.text.prompt import Message, render

    session = load(models["1.0"])
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    row = render(messages, [], session.tokens, session.model.config.projector_config, generate=True)
    text = session.tokens.decode(row.ids, special=True)
    assert text == f"<|begin_of_text|>{SYSTEM} USER: a ASSISTANT: b<|end_of_text|>USER: c ASSISTANT:"
    trained = session.tokens.decode(row.ids[row.supervised], special=True)
    assert trained == " b<|end_of_text|>"

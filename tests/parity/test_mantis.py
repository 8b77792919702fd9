"""Mantis-8B-siglip-llama3: LLaVA's class with `<image>` and `<|pad|>` appended, one patch dropped, numbered pictures.

Pictures in, logits out, against transformers' own class with the prompt that Mantis's processor writes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.inference import load
from mlx_llama3v.text.prompt import Message, render
from mlx_llama3v.weights.vlm import convert_vlm
from tests.family_parity import agree, answer, greedy
from tests.hf_edit import copy, edit_json
from tests.hf_llava import make_llava, picture, reference

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What does the sign say?"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As released: the vocabulary ends with the two appended ids, and the class's own select strategy."""
    source = tmp_path_factory.mktemp("mantis")
    make_llava(source, strategy="default", scaled=False, head=True, extra=("<image>", "<|pad|>"), padding=0)
    edit_json(source / "config.json", vision_feature_select_strategy=None)
    return source


@pytest.fixture(scope="module")
def model(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_vlm(theirs, tmp_path_factory.mktemp("converted") / "model").path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [picture(folder / "a.png"), picture(folder / "b.png", 23, 60, seed=1)]


def written(visual: str, pictures: int, question: str) -> str:
    """A user's turn of Mantis's processor."""
    return "".join(f"(image {n}: <Image>{visual}</Image>)" for n in range(1, pictures + 1)) + question


@pytest.mark.parametrize("count", [1, 2])
def test_logits_and_greedy_answer(count: int, theirs: Path, model: Path, images: list[Path]) -> None:
    assert load_config(model).projector_config.num_tokens((4, 4)) == 15
    expected = reference(theirs, images[:count], QUESTION, content=written)
    agree(answer(model, images[:count], QUESTION), expected)


def test_pictures_are_numbered_through_the_conversation(model: Path, images: list[Path]) -> None:
    """The second turn of a chat brings picture 2, as in the conversation laid out at once."""
    session = load(model)
    first = greedy(session, images[0], "And?", 3)
    greedy(session, images[1], "Sure?", 1)
    turn = session.turns[1]
    asked = session.tokens.decode(session.ids[turn.start : turn.start + turn.length], special=True)
    assert "(image 2: <Image>" in asked and "(image 1" not in asked
    messages = [
        Message("user", "And?", (0,)),
        Message("assistant", session.tokens.decode(first)),
        Message("user", "Sure?", (1,)),
    ]
    assert session.encoder is not None
    layouts = [session.encoder.embed(image).layout for image in images]
    whole = render(messages, layouts, session.tokens, session.model.config.projector_config, generate=True)
    assert session.ids[turn.start : turn.start + turn.length] == whole.ids[-turn.length :].tolist()


def test_the_ids_tell_mantis_from_other_llavas(theirs: Path, tmp_path: Path) -> None:
    """Not the name, nor `<image>` alone: the two appended tokens with nothing behind them."""
    renamed = copy(theirs, tmp_path / "llava-1.5-vicuna")
    assert convert_vlm(renamed, tmp_path / "a").config.prompt_layout.name == "mantis"
    tokenizer = Tokenizer.from_file(str(renamed / "tokenizer.json"))
    text = tokenizer.to_str().replace("<|pad|>", "<pad>")
    (renamed / "tokenizer.json").write_text(text)
    assert convert_vlm(renamed, tmp_path / "b").config.prompt_layout.name != "mantis"
    padded = make_llava(tmp_path / "Mantis-8B-siglip-llama3", extra=("<image>", "<|pad|>"))
    assert convert_vlm(padded, tmp_path / "c").config.prompt_layout.name != "mantis"

"""Exported GGUF files in llama.cpp itself: the same tokens, logits and answers, and the same picture features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_llama3v.checkpoint import load_model
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.inference import Session, load
from mlx_llama3v.text.prompt import Message, render
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.gguf_export import export_gguf
from mlx_llama3v.weights.vlm import convert_vlm
from tests.family_parity import greedy
from tests.hf_edit import edit
from tests.hf_llama import LLAMA3_SCALING
from tests.hf_llava import make_llava, picture
from tests.hf_parity import IDS, distance
from tests.test_export_gguf import make_model, our_features

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
from tests.llama_cpp_peer import Peer

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What is in the picture?"
TEXTS = (
    "Q: What colour is the circle?\nA:",
    "A picture of a red square. The square's number is 12345, isn't it?",
    "größer 漢字  two  spaces\n\n\tand 'quotes' it's 99%",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled bases with an MLP between, random but large enough to be heard, read at the last layer but one."""
    folder = tmp_path_factory.mktemp("tiny")
    convert(TINY / "siglip", TINY / "llama", folder / "model", projector="mlp", tiling=TilingConfig("squash", 0))
    return edit(
        folder / "model", lambda w: w.update({n: v * 4 for n, v in w.items() if n.startswith("projector.body")})
    )


@pytest.fixture(scope="module")
def peer(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    peer = Peer(export_gguf(model, tmp_path_factory.mktemp("gguf") / "out", type="f32"))
    yield peer
    peer.close()


def prompt_ids(session: Session, question: str) -> list[int]:
    config = session.model.config.projector_config
    return list(render([Message("user", question)], [], session.tokens, config, generate=True).ids.tolist())


def our_greedy(model: Path, ids: list[int], count: int) -> list[int]:
    """Greedy tokens after any ids, computed anew each time."""
    ours, stop, found = load_model(model), load(model).tokens.stop, []
    for _ in range(count):
        token = int(mx.argmax(ours(mx.array([ids + found]))[0, -1]).item())
        if token in stop:
            break
        found.append(token)
    return found


def test_text_is_cut_alike(model: Path, peer: Peer) -> None:
    tokens = load(model).tokens
    for text in TEXTS:
        assert peer.encode(text) == tokens.encode(text)
    bos = tokens.decode([tokens.bos], special=True)
    assert peer.encode(bos, special=True) == [tokens.bos]


def test_text_logits_and_greedy_answers(model: Path, peer: Peer) -> None:
    session = load(model)
    ours = load_model(model)
    answered = 0
    for text in TEXTS:
        for ids in ([session.tokens.bos, *session.tokens.encode(text)], prompt_ids(session, text)):
            assert distance(peer.logits(ids), np.array(ours(mx.array([ids])))[0]) <= 1e-4
            expected = our_greedy(model, ids, 12)
            assert peer.greedy(ids, 12) == expected
            answered += len(expected)
    assert answered > 30  # it says something


@pytest.mark.parametrize("tie", [False, True])
def test_scaled_rope_and_both_heads(tie: bool, tmp_path: Path) -> None:
    """Llama 3.1's scaling, and more query heads than key heads: the permuted rows and rope_freqs are right."""
    model = make_model(tmp_path, rope_scaling=LLAMA3_SCALING, tie=tie)
    peer = Peer(export_gguf(model, tmp_path / "out", type="f32"))
    ids = IDS[0] * 4
    expected = np.array(load_model(model)(mx.array([ids])))[0]
    assert distance(peer.logits(ids), expected) <= 1e-4
    assert distance(peer.logits(ids[::-1]), expected) > 0.1
    peer.close()


@pytest.mark.parametrize(("type", "cosine"), [("f16", 0.99999), ("q8_0", 0.999), ("q4_0", 0.9)])
def test_other_types_are_close(type: str, cosine: float, model: Path, tmp_path: Path) -> None:
    peer = Peer(export_gguf(model, tmp_path / "out", type=type), type)
    ids = prompt_ids(load(model), TEXTS[0])
    assert alike(peer.logits(ids), np.array(load_model(model)(mx.array([ids])))[0]).min() > cosine
    peer.close()


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("side", [64, 150])
def test_picture_features_and_answer(side: int, model: Path, peer: Peer, tmp_path: Path) -> None:
    """A square picture: nothing is padded; at 150 px both resize it."""
    image = picture(tmp_path / "a.png", side, side)
    pixels = np.array(Image.open(image).convert("RGB"))
    found, expected = peer.features(pixels), our_features(model, image)
    assert found.shape == expected.shape and alike(found, expected).min() >= 0.9999
    content = f"<__media__>{QUESTION}"
    prompt = rendered(peer, [{"role": "user", "content": content}])
    assert peer.answer(prompt, [pixels], 8, unsaid(model)) == greedy(load(model), image, QUESTION, 8)


def unsaid(model: Path) -> tuple[int, ...]:
    """Markers and placeholders, which our answers never hold; a GGUF file has no place for that."""
    session = load(model)
    return session.tokens.unsaid(session.model.vocab_size)


def rendered(peer: Peer, messages: list[dict[str, str]]) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(peer.template).render(messages=messages, add_generation_prompt=True)


def test_a_converted_llava_answers_too(tmp_path: Path) -> None:
    """hidden_states[-2], a scaled rope, a prompt without markers."""
    convert_vlm(make_llava(tmp_path / "hf"), tmp_path / "model")
    image = picture(tmp_path / "a.png", 32, 32)
    pixels = np.array(Image.open(image).convert("RGB"))
    peer = Peer(export_gguf(tmp_path / "model", tmp_path / "out", type="f32"))
    assert alike(peer.features(pixels), our_features(tmp_path / "model", image)).min() >= 0.999
    prompt = rendered(peer, [{"role": "user", "content": f"<__media__>{QUESTION}"}])
    said = peer.answer(prompt, [pixels], 8, unsaid(tmp_path / "model"))
    assert said == greedy(load(tmp_path / "model"), image, QUESTION, 8)
    peer.close()


def test_without_use_gelu_the_features_are_others(
    model: Path, peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 14 in llama.cpp itself."""
    import gguf

    set_gelu = gguf.GGUFWriter.add_vision_use_gelu
    monkeypatch.setattr(gguf.GGUFWriter, "add_vision_use_gelu", lambda writer, value: set_gelu(writer, False))
    quick = Peer(export_gguf(model, tmp_path / "out", type="f32"))
    pixels = np.array(Image.open(picture(tmp_path / "a.png", 64, 64)).convert("RGB"))
    right, wrong = peer.features(pixels), quick.features(pixels)
    assert distance(wrong, right) > 10 * distance(right, our_features(model, tmp_path / "a.png"))
    quick.close()

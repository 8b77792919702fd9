"""Model directories and SigLIP checkpoints: found, loaded strictly, and saved whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mlx_llama3v import tensors
from mlx_llama3v.checkpoint import (
    load_config,
    load_model,
    load_siglip,
    load_tower,
    save_model,
    save_safetensors_atomic,
)
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.platform import device_name
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.text.siglip import SiglipTokenizer
from mlx_llama3v.vision.encode import patchify
from mlx_llama3v.vision.siglip import position_table
from mlx_llama3v.weights.convert import convert
from tests.hf_edit import copy, edit, edit_json
from tests.hf_llama import make_llama
from tests.hf_parity import distance, logits, pixels
from tests.hf_siglip import make_siglip
from tests.tiny_model import tiny_config

TEXTS = ["a red circle", "A BLUE square and a very long list of other things"]


def write_tokenizer(directory: Path) -> None:
    """A word-level tokenizer within the tiny tower's 64 ids, with SigLIP's </s> as end and padding."""
    words = ["<unk>", "</s>", *sorted(set(" ".join(TEXTS).lower().split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_siglip(tmp_path_factory.mktemp("siglip"))
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model_dir(vision: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(vision, llm, tmp_path_factory.mktemp("out") / "model").path


# -- loading


def test_config_is_read_strictly(model_dir: Path, tmp_path: Path) -> None:
    other = copy(model_dir, tmp_path / "model")
    edit_json(other / "config.json", colour="red")
    with pytest.raises(CheckpointError, match=r"config.json: unknown setting colour"):
        load_model(other)
    edit_json(other / "config.json", model_type="llava")
    with pytest.raises(CheckpointError, match="'llava', expected 'llama3v'"):
        load_config(other)


def test_a_projector_is_untrained_until_a_source_says_otherwise() -> None:
    config = tiny_config()
    assert replace(config, sources={}).untrained and replace(config, sources={"vision": "a", "llm": "b"}).untrained
    assert not any(replace(config, sources={key: "x"}).untrained for key in ("run", "model", "projector"))


def test_every_bad_tensor_is_named_at_once(model_dir: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, mx.array]) -> None:
        del weights["language_model.model.norm.weight"]
        weights["projector.markers"] = mx.ones((7, 64))
        weights["language_model.extra"] = mx.ones((1,))
        weights["vision_tower.extra"] = mx.ones((1,))

    other = edit(copy(model_dir, tmp_path / "model"), spoil)
    with pytest.raises(CheckpointError) as caught:
        load_model(other)
    for phrase in ("missing language_model.model.norm.weight", "unexpected language_model.extra"):
        assert phrase in str(caught.value)
    assert "projector.markers is [7, 64], expected [8, 64]" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"unexpected vision_tower.extra\.$"):
        load_tower(other)


def test_tower_may_be_absent(model_dir: Path, tmp_path: Path) -> None:
    def drop(weights: dict[str, mx.array]) -> None:
        for name in [name for name in weights if name.startswith("vision_tower.")]:
            del weights[name]

    other = edit(copy(model_dir, tmp_path / "model"), drop)
    assert np.array_equal(logits(other), logits(model_dir))
    with pytest.raises(CheckpointError, match="holds no vision tower"):
        load_tower(other)


def test_dtype_follows_the_device_and_can_be_set(model_dir: Path) -> None:
    assert device_name() != "cpu" or load_tower(model_dir).post_layernorm.weight.dtype == mx.float32
    model = load_model(model_dir, "float16")
    dtypes = {name.partition(".")[0]: value.dtype for name, value in tree_flatten(model.parameters())}
    assert dtypes == {"projector": mx.float32, "language_model": mx.float16}
    assert load_tower(model_dir, mx.bfloat16).post_layernorm.weight.dtype == mx.bfloat16
    with pytest.raises(CheckpointError, match="dtype is 'int4'"):
        load_model(model_dir, "int4")


# -- SigLIP as a scorer of texts


def hf_score(directory: Path) -> np.ndarray:
    import torch
    from transformers import SiglipModel

    ids = torch.from_numpy(SiglipTokenizer(directory, 8)(TEXTS)).long()
    image = torch.from_numpy(pixels()).permute(2, 0, 1)[None]
    with torch.no_grad():
        found = SiglipModel.from_pretrained(directory).eval()(input_ids=ids, pixel_values=image)
    return torch.sigmoid(found.logits_per_image).numpy()


def score(directory: Path) -> np.ndarray:
    siglip = load_siglip(directory)
    tower = siglip.model.vision_model
    patches = mx.array(patchify(pixels(), siglip.vision.patch_size))[None]
    pooled = tower.pooled(patches, position_table(tower, (siglip.vision.grid,) * 2)[None])
    texts = siglip.model.text_model(mx.array(siglip.tokenizer(TEXTS)))
    return np.array(mx.sigmoid(siglip.model.logits(pooled, texts)))


def test_siglip_scores_as_transformers_from_both_kinds_of_directory(vision: Path, model_dir: Path) -> None:
    expected = hf_score(vision)
    assert distance(score(vision), expected) < 1e-5
    assert np.array_equal(score(model_dir), score(vision))
    assert expected.min() > 0.01 and np.ptp(expected) > 0.01  # so that the comparison means something


def test_scoring_fails_for_a_perturbed_text_tower(vision: Path, model_dir: Path, tmp_path: Path) -> None:
    name = "text_tower.head.weight"
    spoilt = edit(copy(model_dir, tmp_path / "model"), lambda w: w.update({name: w[name][::-1]}))
    assert distance(score(spoilt), hf_score(vision)) > 1e-3


def test_siglip_texts_are_lower_cased_cut_and_padded(vision: Path) -> None:
    tokenizer = SiglipTokenizer(vision, 8)
    ids = tokenizer([*TEXTS, TEXTS[0].upper(), ""])
    assert ids.shape == (4, 8) and ids.dtype == np.int32
    assert ids[0].tolist()[3:] == [1] * 5 and ids[1, -1] == 1 and 0 not in ids
    assert np.array_equal(ids[0], ids[2]) and ids[3].tolist() == [1] * 8


def test_siglip_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """What SigLIP 1 repositories hold: spiece.model and no tokenizer.json."""
    import sentencepiece

    (tmp_path / "texts").write_text("\n".join(TEXTS * 20).lower())
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"), model_prefix=str(tmp_path / "spiece"), vocab_size=40,
        unk_id=2, bos_id=-1, eos_id=1, pad_id=0, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    ids = SiglipTokenizer(tmp_path, 32)(["A red circle!"])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert ids[0].tolist() == (pieces.encode("a red circle") + [1] * 32)[:32]


def test_a_text_model_has_no_siglip(model_dir: Path, tmp_path: Path) -> None:
    text = copy(model_dir, tmp_path / "text")
    only = {
        name: v for name, v in read_tensors(model_dir).items() if name.startswith(("projector.", "language_model."))
    }
    save_safetensors_atomic(text / "model.safetensors", only)
    (text / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds no SigLIP"):
        load_siglip(text)


def test_siglip_without_its_text_side(vision: Path, llm: Path, tmp_path: Path) -> None:
    lone = make_siglip(tmp_path / "lone", full=False)
    for directory in (lone, convert(lone, llm, tmp_path / "model").path):
        with pytest.raises(CheckpointError, match="no SigLIP text tower"):
            load_siglip(directory)
    mute = copy(vision, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no SigLIP tokenizer"):
        load_siglip(mute)


# -- saving


def test_a_file_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "projector.safetensors"
    save_safetensors_atomic(path, {"a": mx.ones((2,))}, {"step": "1"})
    _, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx", "step": "1"}
    order: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    save_safetensors_atomic(path, {"a": mx.zeros((2,))})
    assert order == ["fsync", "replace", "fsync"]  # the data before its name, then the directory

    def fail(file: str, *rest: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tensors.mx, "save_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors_atomic(path, {"a": mx.ones((2,))})
    assert mx.load(str(path))["a"].tolist() == [0.0, 0.0]
    assert [file.name for file in tmp_path.iterdir()] == ["projector.safetensors"]


@pytest.mark.parametrize(("free", "why"), [(0, errno.ENOSPC), (1 << 40, errno.EIO)])
def test_a_disk_that_takes_no_more_is_an_error_of_the_file(
    free: int, why: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"w\.safetensors") as caught:
            save_safetensors_atomic(tmp_path / "w.safetensors", {"a": mx.ones((1000,))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == why and not [*tmp_path.iterdir()]


def test_save_model_round_trip(model_dir: Path, tmp_path: Path) -> None:
    config, weights = load_config(model_dir), read_tensors(model_dir)
    save_model(tmp_path / "a" / "b", config, weights.items(), files={"siglip/note.txt": "text"})
    assert load_config(tmp_path / "a" / "b") == config
    assert np.array_equal(logits(tmp_path / "a" / "b"), logits(model_dir))
    assert (tmp_path / "a" / "b" / "siglip" / "note.txt").read_text() == "text"


def test_a_tensor_in_two_files_is_refused(model_dir: Path, tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": mx.ones((1,))})
    mx.save_safetensors(str(tmp_path / "b.safetensors"), {"x": mx.zeros((1,))})
    with pytest.raises(CheckpointError, match=r"b.safetensors repeats x"):
        read_tensors(tmp_path)

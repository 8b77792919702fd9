"""`export --format peft`: a run's adapters, loaded by peft onto the Hugging Face decoder, give our logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama3v.checkpoint import load_model, load_run
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.peft import export_peft
from tests.hf_edit import copy, edit_json
from tests.hf_llama import make_llama
from tests.hf_parity import IDS, distance
from tests.hf_siglip import make_siglip

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vision = make_siglip(tmp_path_factory.mktemp("siglip"))
    return convert(vision, llm, tmp_path_factory.mktemp("out") / "model", projector="mlp").path


def make_run(run: Path, model: Path, kind: str = "lora", num_layers: int = 1) -> Path:
    """Adapters as a training run leaves them, with random values."""
    import json

    from mlx.utils import tree_flatten

    from mlx_llama3v.compat import linear_to_lora_layers

    run.mkdir()
    lora: dict[str, Any] = {"rank": 3, "scale": 2.5, "dropout": 0.1, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    settings = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": lora}
    (run / "adapter_config.json").write_text(json.dumps(settings))
    decoder = load_model(model).language_model
    linear_to_lora_layers(decoder, num_layers, dict(lora), use_dora=kind == "dora")
    mx.random.seed(0)
    learned = {
        name: value * 1.5 if name.endswith(".m") else mx.random.normal(value.shape) * 0.3
        for name, value in tree_flatten(decoder.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    mx.save_safetensors(str(run / "adapters.safetensors"), learned)
    return run


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_gives_our_logits(kind: str, llm: Path, model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import LlamaForCausalLM

    run = make_run(tmp_path / "run", model, kind)
    adapter = export_peft(model, run, tmp_path / "peft")
    ours = load_model(model)
    before = np.array(ours(mx.array(IDS)))
    load_run(ours, run)
    after = np.array(ours(mx.array(IDS)))
    base = LlamaForCausalLM.from_pretrained(llm, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        theirs = adapted(torch.tensor(IDS)).logits.numpy()
    assert distance(after, theirs) <= 1e-4
    assert distance(before, theirs) > 1e-2  # the adapters do something


def test_runs_that_peft_cannot_hold_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no adapters"):
        export_peft(model, tmp_path / "empty", tmp_path / "out")
    run = make_run(tmp_path / "run", model)
    edit_json(run / "adapter_config.json", fine_tune_type="full")
    with pytest.raises(CheckpointError, match="fuse"):
        export_peft(model, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_is_named_where_there_is_one(model: Path, tmp_path: Path) -> None:
    """PEFT would load a vision-language model by that name, in which the adapter's modules are called otherwise."""
    run = make_run(tmp_path / "run", model)
    for sources, expected in (({"vision": "v", "llm": "l"}, "l"), ({"vision": "m", "llm": "m", "model": "m"}, "")):
        edit_json(copy(model, tmp_path / expected / "model") / "config.json", sources=sources)
        out = export_peft(tmp_path / expected / "model", run, tmp_path / expected / "out")
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == expected

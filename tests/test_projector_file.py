"""A projector in a file of its own between two checkpoints, as llama-3-vision-alpha was first released."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mlx_llama3v.checkpoint import load_config, load_siglip
from mlx_llama3v.cli.app import build
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.weights.convert import convert, open_parts, plan
from mlx_llama3v.weights.storage import Storage
from mlx_llama3v.weights.vlm import convert_vlm
from tests import hf_family as hf
from tests.family_parity import agree, answer, gap
from tests.hf_edit import edit
from tests.hf_llava import picture

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What does it say?"
HEADER = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class Parts:
    """A SigLIP and a Llama as released, and a projector trained between them."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.siglip, self.llama = folder / "siglip", folder / "llama"
        self.tower, self.projector = hf.tower(), hf.mlp(64, 64)
        self.tokenizer = hf.make_tokenizer(self.llama)
        self.llm = hf.decoder(len(self.tokenizer))
        hf.save(self.llama, hf.llama_values(self.llm, model_type="llama", eos_token_id=309), {"": self.llm})
        vision = {**self.tower.config.to_dict(), "model_type": "siglip_vision_model"}
        hf.save(self.siglip, vision, {"vision_model.": self.tower})
        (self.siglip / "preprocessor_config.json").write_text('{"resample": 3, "image_mean": 0.5, "image_std": 0.5}')

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + name: value.detach().clone() for name, value in self.projector.state_dict().items()}

    @torch.no_grad()
    def answer(self, image: Path) -> Any:
        pixels = hf.pixels(Image.open(image).convert("RGB"), (32, 32))
        visual = self.projector(self.tower(pixels, output_hidden_states=True).hidden_states[-2][0])
        pieces = [hf.ids(self.tokenizer, HEADER), visual, hf.ids(self.tokenizer, QUESTION + ANSWER)]
        return hf.decode(self.llm, self.tokenizer, pieces)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def refused(*args: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value) and not Path(args[2]).exists()
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "", "mm_projector.model."])
def test_logits_and_greedy_answer(prefix: str, parts: Parts, tmp_path: Path) -> None:
    file = saved(tmp_path / "released" / "mm_projector.safetensors", parts.state(prefix))
    image = picture(tmp_path / "a.png")
    where = file if prefix else file.parent  # the file, or the directory that holds it
    config = convert(parts.siglip, parts.llama, tmp_path / "model", projector=where).config
    assert config.sources["projector"] == where.name and config.tiling.mode == "squash"
    agree(answer(tmp_path / "model", image, QUESTION), parts.answer(image))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "All three parts come trained" in card and f"the projector of `{where.name}`" in card
    if not prefix:
        name = "projector.body.linear_2.bias"
        spoilt = edit(tmp_path / "model", lambda weights: weights.update({name: weights[name] + 0.2}))
        assert gap(answer(spoilt, image, QUESTION).logits, parts.answer(image).logits) > 1e-3


def test_names_of_hugging_face_and_a_linear_one(parts: Parts, tmp_path: Path) -> None:
    mlp = parts.state("multi_modal_projector.")
    renamed = {n.replace(".0.", ".linear_1.").replace(".2.", ".linear_2."): v for n, v in mlp.items()}
    file = saved(tmp_path / "a.safetensors", renamed)
    convert(parts.siglip, parts.llama, tmp_path / "mlp", projector=file)
    held = read_tensors(tmp_path / "mlp", ("projector.body.",))
    assert sorted(held) == [f"projector.body.linear_{n}.{p}" for n in (1, 2) for p in ("bias", "weight")]
    linear = {f"model.mm_projector.{n}": v for n, v in parts.projector[0].state_dict().items()}
    config = convert(
        parts.siglip, parts.llama, tmp_path / "one", projector=saved(tmp_path / "b.safetensors", linear)
    ).config
    assert config.projector_config.kind == "linear" and config.vision_feature_layer == -2


def test_a_pickle_is_refused_with_the_line_that_helps(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is run as a shell would run it (but in this process); what it writes is read."""
    file = tmp_path / "it's mine" / "mm_projector.bin"
    file.parent.mkdir()
    torch.save(parts.state("model.mm_projector."), file)
    for where in (file, file.parent):
        text = refused(parts.siglip, parts.llama, tmp_path / "model", projector=where)
        assert str(file) in text and "can run code" in text and "torch.load" in text
    with pytest.raises(CheckpointError, match="--projector"):
        convert_vlm(file.parent, tmp_path / "model")  # alone it is no model
    python, option, code, *names = shlex.split(text[text.index("python -c") :])
    assert (python, option) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", [option, *names])
    exec(code, {})
    convert(parts.siglip, parts.llama, tmp_path / "model", projector=file.with_suffix(".safetensors"))
    expected = parts.projector[2].bias.detach().numpy()
    assert (expected == read_tensors(tmp_path / "model")["projector.body.linear_2.bias"]).all()


def test_what_does_not_fit_is_named(parts: Parts, tmp_path: Path) -> None:
    state = parts.state("model.mm_projector.")
    wide = {**state, "model.mm_projector.0.weight": torch.zeros(64, 192)}
    text = refused(parts.siglip, parts.llama, tmp_path / "m", projector=saved(tmp_path / "wide.safetensors", wide))
    assert "--projector: projector.body.linear_1.weight is [64, 192], expected [64, 64]" in text
    more = saved(tmp_path / "more.safetensors", {**state, "extra.gain": torch.zeros(2)})
    assert "--projector: unexpected extra.gain" in refused(parts.siglip, parts.llama, tmp_path / "m", projector=more)
    other = saved(tmp_path / "other.safetensors", {"query": torch.zeros(2)})
    assert "other.safetensors holds query" in refused(parts.siglip, parts.llama, tmp_path / "m", projector=other)
    assert "missing" in refused(parts.siglip, parts.llama, tmp_path / "m", projector=tmp_path / "no.safetensors")
    assert "missing" in refused(parts.siglip, parts.llama, tmp_path / "m", projector=tmp_path / "no.bin")
    (tmp_path / "empty").mkdir()
    assert "no *projector*.safetensors" in refused(
        parts.siglip, parts.llama, tmp_path / "m", projector=tmp_path / "empty"
    )
    assert "trained model" in refused(parts.siglip, parts.llama, tmp_path / "m", prompt_layout="vicuna")


def test_dry_run_of_two_and_of_three_checkpoints(parts: Parts, tmp_path: Path) -> None:
    """Family, every name, what is left over or missing, sizes; and nothing is written."""
    file = saved(tmp_path / "p.safetensors", parts.state("model.mm_projector."))
    for projector, name in (("attention", "siglip + llama"), (str(file), "siglip + llama + projector")):
        found = plan(open_parts(parts.siglip, parts.llama, Storage(dtype="float16"), projector=projector))
        assert (found.name, found.problems, found.renamed.unknown) == (name, (), ())
        report = convert(parts.siglip, parts.llama, tmp_path / name, projector=projector, dtype="float16")
        assert found.bytes_after == sum(report.bytes.values()) and found.bytes_before > found.bytes_after / 2
        ours = set(read_tensors(tmp_path / name)) - {"projector.markers"}
        fresh = {n for n in ours if n.startswith("projector.")} if projector == "attention" else set()
        assert set(found.renamed.names.values()) == ours - fresh
    spoilt = saved(tmp_path / "q.safetensors", {**parts.state(""), "stray": torch.zeros(1)})
    found = plan(open_parts(parts.siglip, parts.llama, Storage(), projector=spoilt))
    assert found.renamed.unknown == ("projector: stray",) and found.bytes_after == 0
    arguments = ["convert", "--vision", str(parts.siglip), "--llm", str(parts.llama), "--projector", str(spoilt)]
    out = CliRunner().invoke(build(["convert"]), [*arguments, "--mlx-path", str(tmp_path / "m"), "--dry-run"]).output
    assert "left over: projector: stray" in out and "does not fit" in out and not (tmp_path / "m").exists()
    assert "llm: lm_head.weight" in out and "language_model.lm_head.weight" in out


def test_the_dry_run_names_what_is_missing_and_dropped(tmp_path: Path) -> None:
    from tests.hf_llama import make_llama
    from tests.hf_siglip import make_siglip

    vision, llm = make_siglip(tmp_path / "siglip"), make_llama(tmp_path / "llama", tie=True)
    buffers = {"vision_model.embeddings.position_ids": mx.arange(16)[None]}
    edit(vision, lambda w: (w.update(buffers), w.pop("text_model.head.bias")))
    edit(llm, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"], "stray.weight": mx.zeros(2)}))
    found = plan(open_parts(vision, llm, Storage()))
    assert found.problems == ("missing text_tower.head.bias",)
    assert found.renamed.unknown == ("llm: stray.weight",)
    assert found.renamed.skipped == ("vision: vision_model.embeddings.position_ids", "llm: lm_head.weight")


def test_the_text_tower_stays(parts: Parts, tmp_path: Path) -> None:
    """With a whole SigLIP, `classify` goes on working."""
    from mlx_llama3v.weights import TINY

    tiny = load_config(convert(TINY / "siglip", TINY / "llama", tmp_path / "tiny").path)
    width, out = tiny.vision_config.hidden_size, tiny.hidden_size
    state = {"0.weight": torch.zeros(out, width), "2.weight": torch.zeros(out, out)}
    state |= {f"{n}.bias": torch.zeros(out) for n in (0, 2)}
    file = saved(tmp_path / "p.safetensors", state)
    convert(TINY / "siglip", TINY / "llama", tmp_path / "model", projector=file)
    assert load_siglip(tmp_path / "model").model

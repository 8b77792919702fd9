"""In what dtype `convert` stores a projector that others trained: that of the checkpoint or the one asked for."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llama3v.checkpoint import load_config, load_model, load_projector, load_run, read_model
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.inference import load
from mlx_llama3v.tensors import parameters, read_tensors
from mlx_llama3v.weights.convert import convert, open_parts, plan
from mlx_llama3v.weights.export import export_hf
from mlx_llama3v.weights.fuse import fuse
from mlx_llama3v.weights.quantize import QuantConfig
from mlx_llama3v.weights.storage import Storage
from mlx_llama3v.weights.vlm import convert_vlm, open_vlm, plan_vlm
from tests.family_parity import prompt_logits
from tests.hf_edit import copy, edit
from tests.hf_llama import make_llama
from tests.hf_llava import make_llava, picture
from tests.hf_siglip import make_siglip

pytestmark = pytest.mark.usefixtures("quick_disk")

QUANT = QuantConfig(4, 32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA in float32."""
    return make_llava(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def half(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bfloat16."""
    return cast(copy(wide, tmp_path_factory.mktemp("half") / "hf"), mx.bfloat16)


def cast(directory: Path, dtype: mx.Dtype) -> Path:
    return edit(directory, lambda w: w.update({name: value.astype(dtype) for name, value in w.items()}))


def dtypes(directory: Path, part: str = "projector.") -> set[mx.Dtype]:
    return {value.dtype for value in read_tensors(directory, (part,)).values()}


def stored_exactly(found: Path, expected: Path) -> bool:
    ours, theirs = read_tensors(found), read_tensors(expected)
    same = (v.dtype == theirs[n].dtype and bool(mx.array_equal(v, theirs[n])) for n, v in ours.items())
    return ours.keys() == theirs.keys() and all(same)


@pytest.mark.parametrize(
    ("dtype", "quantize", "from_wide", "from_half"),
    [
        (None, None, mx.float32, mx.bfloat16),
        ("float16", None, mx.float16, mx.float16),
        ("float32", None, mx.float32, mx.float32),
        (None, QUANT, mx.bfloat16, mx.bfloat16),
        ("float16", QUANT, mx.float16, mx.float16),
        ("float32", QUANT, mx.float32, mx.float32),
    ],
)
def test_as_stored_or_as_asked(
    dtype: str | None,
    quantize: QuantConfig | None,
    from_wide: mx.Dtype,
    from_half: mx.Dtype,
    wide: Path,
    half: Path,
    tmp_path: Path,
) -> None:
    """Tower and projector alike, markers included; and the dry run knows the size."""
    for source, expected in ((wide, from_wide), (half, from_half)):
        target = tmp_path / source.name
        report = convert_vlm(source, target, quantize=quantize, dtype=dtype)
        assert dtypes(target) == dtypes(target, "vision_tower.") == {expected}
        found = plan_vlm(open_vlm(source, Storage(quantize, dtype)))
        held = sum(value.nbytes for value in read_tensors(target).values())
        assert found.bytes_after == sum(report.bytes.values()) == held


def test_a_float32_tower_beside_a_narrow_decoder(tmp_path: Path) -> None:
    """As Google's SigLIPs and Meta's Llamas are released; and beside a Llama that mlx-lm quantized."""
    vision, llm = make_siglip(tmp_path / "v"), cast(make_llama(tmp_path / "l"), mx.bfloat16)
    for dtype, expected in ((None, mx.bfloat16), ("float32", mx.float32)):
        report = convert(vision, llm, tmp_path / f"m-{dtype}", dtype=dtype)
        assert dtypes(report.path, "vision_tower.") == dtypes(report.path, "text_tower.") == {expected}
        found = plan(open_parts(vision, llm, Storage(dtype=dtype)))
        assert found.bytes_after == sum(report.bytes.values())
    assert dtypes(convert(vision, make_llama(tmp_path / "w"), tmp_path / "wide").path, "vision_tower.") == {mx.float32}
    exported = export_hf(
        convert(vision, llm, tmp_path / "e", projector="linear", dtype="float32").path, tmp_path / "hf", squash=True
    )
    assert dtypes(convert_vlm(exported, tmp_path / "again").path, "vision_tower.") == {mx.float32}


def test_sixteen_bits_answer_as_the_same_values_in_float32(half: Path, tmp_path: Path) -> None:
    """On disk half as much; loaded, the parameters are float32 and the logits those of a projector kept in float32."""
    widened = cast(copy(half, tmp_path / "widened"), mx.float32)
    small, large = convert_vlm(half, tmp_path / "small"), convert_vlm(widened, tmp_path / "large")
    assert small.bytes["projector"] * 2 == large.bytes["projector"]
    projector = load_model(small.path).projector
    assert {value.dtype for _, value in tree_flatten(projector.parameters())} == {mx.float32}
    image = picture(tmp_path / "a.png")
    found, expected = (prompt_logits(load(report.path), image, "What?") for report in (small, large))
    assert np.array_equal(found, expected)
    edit(small.path, lambda w: w.update({"projector.body.linear_2.bias": w["projector.body.linear_2.bias"] + 1}))
    assert not np.array_equal(prompt_logits(load(small.path), image, "What?"), expected)


def test_what_a_run_learned_is_not_rounded(half: Path, tmp_path: Path) -> None:
    """Its projector is float32, and stays so where the model has 16 bit: opened to write again, fused, exported."""
    model = convert_vlm(half, tmp_path / "model").path
    learned = {name: value + 1e-5 for name, value in parameters(load_model(model).projector).items()}
    (tmp_path / "run").mkdir()
    mx.save_safetensors(str(tmp_path / "run" / "projector.safetensors"), learned)
    for opened in (read_model(model), load_model(model)):
        load_run(opened, tmp_path / "run")
        assert all(mx.array_equal(value, learned[name]) for name, value in parameters(opened.projector).items())
    exported = convert_vlm(export_hf(model, tmp_path / "hf", run=tmp_path / "run"), tmp_path / "again").path
    for written in (fuse(model, tmp_path / "run", tmp_path / "fused"), exported):
        held = read_tensors(written, ("projector.body.",))
        assert {value.dtype for value in held.values()} == {mx.float32}
        assert all(mx.array_equal(value, learned[name.removeprefix("projector.")]) for name, value in held.items())
        assert dtypes(written, "language_model.") == {mx.bfloat16}


def test_a_narrow_projector_is_widened_by_whoever_computes(half: Path, tmp_path: Path) -> None:
    model = convert_vlm(half, tmp_path / "model").path
    mx.save_safetensors(str(tmp_path / "projector.safetensors"), parameters(read_model(model).projector))
    found = parameters(load_projector(load_config(model), tmp_path / "projector.safetensors"))
    assert {value.dtype for value in found.values()} == {mx.float32}


def test_the_card_says_what_is_quantized(half: Path, tmp_path: Path) -> None:
    card = (convert_vlm(half, tmp_path / "model", quantize=QUANT).path / "README.md").read_text()
    assert ", the decoder quantized to 4 bits, joined by" in card


def test_a_sixteen_bit_model_survives_export(half: Path, wide: Path, tmp_path: Path) -> None:
    for name, source in (("half", half), ("wide", wide)):
        first = convert_vlm(source, tmp_path / name).path
        again = convert_vlm(export_hf(first, tmp_path / f"{name}-hf"), tmp_path / f"{name}-again").path
        assert stored_exactly(again, first)


@pytest.mark.parametrize(("dtype", "expected"), [(None, mx.float16), ("bfloat16", mx.bfloat16)])
def test_a_projector_file_keeps_its_dtype(dtype: str | None, expected: mx.Dtype, tmp_path: Path) -> None:
    vision, llm, file = make_siglip(tmp_path / "v"), make_llama(tmp_path / "l"), tmp_path / "p.safetensors"
    values = {"0.weight": mx.random.normal((64, 32)), "2.weight": mx.random.normal((64, 64))}
    values |= {f"{n}.bias": mx.ones(64) for n in (0, 2)}
    mx.save_safetensors(str(file), {name: value.astype(mx.float16) for name, value in values.items()})
    report = convert(vision, llm, tmp_path / "model", projector=file, dtype=dtype)
    assert dtypes(tmp_path / "model") == {expected}
    assert plan(open_parts(vision, llm, Storage(dtype=dtype), projector=file)).bytes_after == sum(report.bytes.values())


def test_a_fresh_projector_is_float32_whatever_is_asked(tmp_path: Path) -> None:
    """It is where training starts: one seed gives one start."""
    vision, llm = make_siglip(tmp_path / "v"), make_llama(tmp_path / "l")
    convert(vision, llm, tmp_path / "model", dtype="float16", quantize=QUANT)
    assert dtypes(tmp_path / "model") == {mx.float32}
    assert dtypes(tmp_path / "model", "vision_tower.") == {mx.float16}


def test_an_unknown_dtype_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype is 'int8'"):
        convert_vlm(tmp_path / "nowhere", tmp_path / "model", dtype="int8")


@pytest.mark.parametrize("storage", [Storage(), Storage(dtype="float16"), Storage(QUANT)])
def test_the_seed_alone_makes_a_fresh_projector(storage: Storage, tmp_path: Path) -> None:
    vision, llm = make_siglip(tmp_path / "v"), make_llama(tmp_path / "l")
    plain = convert(vision, llm, tmp_path / "plain", seed=3).path
    other = convert(vision, llm, tmp_path / "m", seed=3, quantize=storage.quantize, dtype=storage.dtype).path
    found, expected = (read_tensors(path, ("projector.",)) for path in (other, plain))
    assert all(mx.array_equal(value, expected[name]) for name, value in found.items()) and dtypes(other) == {mx.float32}

"""The same loss and gradients, however a batch is computed: packed, recomputed, in chunks, in parts, on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llama3v.compat import LoRALinear
from mlx_llama3v.data.batches import bins, collate
from mlx_llama3v.data.records import Record
from mlx_llama3v.data.rows import Row, RowLayout
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import RunError
from mlx_llama3v.tensors import load_file
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.train import loss as loss_module
from mlx_llama3v.train.lora import prepare
from mlx_llama3v.train.optim import adamw
from mlx_llama3v.train.step import Step, add
from tests.ranks import LAUNCH, launch
from tests.test_loss import assert_same, found, numbers, prepared, rows_of
from tests.test_reference import rows_of as reference_rows
from tests.test_resume import outcome
from tests.tiny_model import tiny_model, tiny_tokens
from tests.tiny_run import SHORT, chats, make_store, run, settings, short_run

RATES = ("rows_per_second", "images_per_second", "tokens_per_second")
STAGES = [("pretrain", {}), ("sft", {}), ("sft", {"tune": "full"}), ("sft", {"tune_projector": True})]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


def mixed_rows(model: Any, store: Store) -> list[Row]:
    """A long row, and pictures, several pictures and text alone that fit beside one another."""
    others = reference_rows(model, store)
    messages = (Message("user", "Say more.", (0,)), Message("assistant", "more and more " * 20))
    layout = RowLayout(store, tiny_tokens(), model.config.projector_config, "sft", 1000)
    return [layout.whole(Record("long", ("3.png",), messages)), *others]


def computed(model: Any, batch: Any, **how: Any) -> tuple[float, int, dict[str, np.ndarray]]:
    optimizer = adamw(0.0)
    optimizer.init(model.trainable_parameters())
    loss, count, gradients = Step(model, optimizer, compiled=how.pop("compiled", False), **how).gradients(batch)
    mx.eval(loss, count, gradients)
    return float(loss), int(count), numbers(gradients)


def assert_equal(one: tuple[float, int, Any], other: tuple[float, int, Any]) -> None:
    assert one[1] == other[1]
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    assert_same(one[2], other[2])


@pytest.mark.parametrize(("stage", "over"), STAGES)
def test_packed_is_padded(stage: str, over: dict[str, Any], store: Store) -> None:
    model = prepared(stage, **over)
    rows = mixed_rows(model, store)
    plain = collate(rows, store, model.config, pad_to=4)
    packed = collate(rows, store, model.config, pad_to=4, packed=True)
    assert packed.segments is not None and int(packed.segments.max()) > 1
    assert packed.ids.shape[0] < plain.ids.shape[0] and packed.padding < plain.padding
    assert_equal(found(model, plain), found(model, packed))


def test_packed_rows_do_not_see_each_other(store: Store) -> None:
    from dataclasses import replace

    model = prepared("pretrain")
    packed = collate(mixed_rows(model, store), store, model.config, pad_to=4, packed=True)
    assert packed.segments is not None
    mixed = replace(packed, segments=mx.minimum(packed.segments, 1))
    assert abs(found(model, packed)[0] - found(model, mixed)[0]) > 0.01


def test_rows_are_packed_whole_and_once(store: Store) -> None:
    rows = rows_of(prepared("pretrain"), store, 20)
    most = 2 * max(map(len, rows))
    together = bins(rows, most)
    assert sorted(row.id for sequence in together for row in sequence) == sorted(row.id for row in rows)
    assert all(sum(map(len, sequence)) <= most for sequence in together) and len(together) <= 11


@pytest.mark.parametrize(("stage", "over"), STAGES)
def test_recomputed_is_kept(stage: str, over: dict[str, Any], store: Store) -> None:
    model = prepared(stage, **over)
    batch = collate(rows_of(model, store, 5), store, model.config)
    assert_equal(found(model, batch), computed(model, batch, recompute=True))


def test_recomputing_refuses_dropout() -> None:
    """The masks of the second pass would be others, and the gradient wrong."""
    with pytest.raises(RunError, match="grad_checkpoint computes blocks twice, and lora_dropout would differ"):
        settings("sft", grad_checkpoint=True, lora_dropout=0.1)


@pytest.mark.parametrize(("stage", "over"), STAGES)
def test_chunks_of_the_head_add_up(
    stage: str, over: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(stage, **over)
    batch = collate(rows_of(model, store, 5), store, model.config)
    whole = found(model, batch)
    sizes: list[int] = []
    logits = type(model).logits

    def seen(self: Any, hidden: mx.array) -> mx.array:
        sizes.append(hidden.shape[0])
        return logits(self, hidden)

    monkeypatch.setattr(type(model), "logits", seen)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * model.vocab_size * 7)
    assert_equal(whole, found(model, batch))
    assert max(sizes) == 7 and sum(sizes) >= batch.picks.size


@pytest.mark.parametrize("count", [2, 3, 7])
def test_one_batch_is_k_micro_batches(count: int, store: Store) -> None:
    model = prepared("sft", tune_projector=True)
    rows = rows_of(model, store, 7)
    whole = found(model, collate(rows, store, model.config))
    optimizer = adamw(0.0)
    optimizer.init(model.trainable_parameters())
    step, total = Step(model, optimizer, compiled=False), None
    for n in range(count):
        part = step.gradients(collate(rows[n::count], store, model.config))
        total = part if total is None else add(total, part)
    assert total is not None
    assert_equal(whole, (float(total[0]), int(total[1]), numbers(total[2])))


@pytest.mark.parametrize(
    "over", [{"batch_size": 4, "grad_accumulation_steps": 2}, {"batch_size": 2, "rows_per_step": 8}, {"pack": True}]
)
def test_a_run_does_not_depend_on_how_its_steps_are_made(over: dict[str, Any], store: Store, tmp_path: Path) -> None:
    """All rows are one step, so that only the arithmetic differs."""
    base = {"iters": 3, "batch_size": 8, "learning_rate": 1e-2, "clip": 0.0, "save_every": 0, "steps_per_report": 1}
    records = chats(8)
    run(settings("sft", **base), store, tmp_path / "one", records=records)
    run(settings("sft", **{**base, **over}), store, tmp_path / "other", records=records)
    one, other = (load_file(tmp_path / name / "adapters.safetensors") for name in ("one", "other"))
    for name, value in one.items():
        np.testing.assert_allclose(np.array(other[name]), np.array(value), atol=1e-4, err_msg=name)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "other")]
    for a, b in zip(*(map(json.loads, part) for part in lines), strict=True):
        assert (a["tokens"], b["loss"]) == (b["tokens"], pytest.approx(a["loss"], rel=1e-4))
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
def test_one_rank_is_two_ranks(store: Store, tmp_path: Path) -> None:
    """Real processes: every rank reads its part of a batch; also the last one, which is too small for both."""
    one, two = tmp_path / "one", tmp_path / "two"
    code = "import tests.without_torch, runpy; runpy.run_module('tests.tiny_run', run_name='__main__')"
    done = launch(sys.executable, "-c", code, str(two), str(store.path))
    assert done.returncode == 0 and (two / "sft" / "adapters.safetensors").exists(), done.stdout + done.stderr
    whole, parted = outcome(two / "parted-0"), outcome(two / "parted-3")
    cut = parted.pop("checkpoints/step-0000003/weights.safetensors")
    assert parted.pop("checkpoints/step-0000003/optimizer.safetensors") and cut != whole["adapters.safetensors"]
    assert parted == whole, "resumed on two ranks, the run is another than the uninterrupted one"
    for stage in SHORT:
        name = "adapters.safetensors" if stage == "sft" else "projector.safetensors"
        short_run(stage, store, one / stage)
        mine, theirs = (load_file(path / stage / "gradients.safetensors") for path in (one, two))
        assert_same({k: np.array(v) for k, v in mine.items()}, {k: np.array(v) for k, v in theirs.items()})
        mine, theirs = load_file(one / stage / name), load_file(two / stage / name)
        for key, value in mine.items():
            np.testing.assert_allclose(np.array(theirs[key]), np.array(value), atol=2e-4, err_msg=key)
        lines = [(path / stage / "metrics.jsonl").read_text().splitlines() for path in (one, two)]
        before = {id(one): 0.0, id(two): 0.0}
        for a, b in zip(*(map(json.loads, part) for part in lines), strict=True):
            assert a.keys() == b.keys()
            for key in ("step", "tokens", "epoch", "loss", "grad_norm", "eval_loss", "eval_shuffled"):
                if key in a:
                    assert b[key] == pytest.approx(a[key], rel=1e-3), (stage, key)
            for line, path in ((a, one), (b, two)):  # rates count the rows of all ranks
                if "seconds" in line:
                    took, before[id(path)] = line["seconds"] - before[id(path)], line["seconds"]
                    line |= {key: line[key] * took for key in RATES}
            assert [b.get(key) for key in RATES] == pytest.approx([a.get(key) for key in RATES]), stage


@pytest.mark.parametrize(("tune", "recompute"), [("lora", False), ("lora", True), ("full", False)])
def test_a_16_bit_decoder_computes_in_16_bits_throughout(
    store: Store, monkeypatch: pytest.MonkeyPatch, tune: str, recompute: bool
) -> None:
    model = tiny_model(scale=1.0)
    model.language_model.set_dtype(mx.bfloat16)
    learns = prepare(model, settings("sft", tune=tune))
    assert learns.dtype == mx.bfloat16
    noise = [(n, mx.random.normal(v.shape, scale=0.1)) for n, v in learned_of(model) if n.endswith("lora_b")]
    model.load_weights(noise, strict=False)
    batch = collate(rows_of(model, store), store, model.config, 4)
    exact = computed(model, batch)
    seen = set()
    kind = LoRALinear if tune == "lora" else nn.Linear
    call = kind.__call__

    def watch(self: Any, x: mx.array) -> mx.array:
        seen.update({x.dtype, *(value.dtype for _, value in tree_flatten(self.trainable_parameters()))})
        return call(self, x)

    monkeypatch.setattr(kind, "__call__", watch)
    rounded = computed(model, batch, recompute=recompute, dtype=learns.dtype)
    assert seen == {mx.bfloat16}
    assert {value.dtype for _, value in learned_of(model)} == {mx.float32}
    assert {value.dtype for value in rounded[2].values()} == {np.dtype(np.float32)}
    assert rounded[0] == pytest.approx(exact[0], rel=1e-2)
    for name, want in exact[2].items():
        assert np.linalg.norm(rounded[2][name] - want) < 0.05 * np.linalg.norm(want) + 1e-6, name


def test_dora_is_not_rounded() -> None:
    model = tiny_model()
    model.language_model.set_dtype(mx.bfloat16)
    assert prepare(model, settings("sft", tune="dora")).dtype == mx.float32


def learned_of(model: Any) -> list[tuple[str, mx.array]]:
    found: list[tuple[str, mx.array]] = tree_flatten(model.trainable_parameters())
    return found

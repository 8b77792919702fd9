"""The loss: equal to the naive one over full logits, a sum that adds up, blind to padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llama3v.data.batches import Batch, collate
from mlx_llama3v.data.rows import Row, RowLayout, build_rows
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.model import Llama3V
from mlx_llama3v.train import loss as train_loss
from mlx_llama3v.train.lora import prepare
from mlx_llama3v.train.optim import adamw
from mlx_llama3v.train.step import Step
from tests.tiny_model import tiny_model, tiny_tokens
from tests.tiny_run import chats, make_store, settings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


def prepared(stage: str, **over: Any) -> Llama3V:
    """A model whose fresh LoRA matrices are not zero, so that every gradient is there."""
    model = tiny_model()
    prepare(model, settings(stage, **over))
    names = dict(tree_flatten(model.trainable_parameters()))
    noise = [(n, mx.random.normal(v.shape, scale=0.3)) for n, v in names.items() if n.endswith("lora_b")]
    model.load_weights(noise, strict=False)
    return model


def rows_of(model: Llama3V, store: Store, count: int = 4) -> list[Row]:
    projector = model.config.projector_config
    return [*build_rows(chats(count), RowLayout(store, tiny_tokens(), projector, "sft", 1000))[0]]


def found(model: Llama3V, batch: Batch, compiled: bool = False) -> tuple[float, int, dict[str, np.ndarray]]:
    """Summed loss, count and gradients by name, as a training step has them."""
    optimizer = adamw(0.0)
    optimizer.init(model.trainable_parameters())
    loss, count, gradients = Step(model, optimizer, compiled=compiled).gradients(batch)
    mx.eval(loss, count, gradients)
    return float(loss), int(count), numbers(gradients)


def naive(model: Llama3V, batch: Batch) -> tuple[float, int, dict[str, np.ndarray]]:
    """The same from logits of all positions and a masked cross entropy."""

    def loss(model: Llama3V) -> mx.array:
        vectors = model.embed(batch.ids, batch.source, batch.patches, batch.grid, batch.num_tokens)
        logits = model(batch.ids, input_embeddings=vectors)[:, :-1]
        losses = nn.losses.cross_entropy(logits, batch.ids[:, 1:])
        return (losses * batch.supervised[:, :-1]).sum()

    value, gradients = nn.value_and_grad(model, loss)(model)
    return float(value), int(batch.supervised.sum()), numbers(gradients)


def numbers(gradients: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(gradients)}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float = 2e-4) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = np.abs(value).max() + 1e-3
        np.testing.assert_allclose(other[name], value, atol=tolerance * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("stage", "over", "compiled"),
    [
        ("pretrain", {}, False),
        ("sft", {}, False),
        ("sft", {"tune": "full"}, False),
        pytest.param("pretrain", {}, True, marks=pytest.mark.slow),
        pytest.param("sft", {"lora_layers": 1}, True, marks=pytest.mark.slow),
    ],
)
def test_it_equals_the_naive_loss(stage: str, over: dict[str, Any], compiled: bool, store: Store) -> None:
    model = prepared(stage, **over)
    batch = collate(rows_of(model, store), store, model.config)
    loss, count, gradients = found(model, batch, compiled)
    expected, expected_count, expected_gradients = naive(model, batch)
    assert (count, round(loss, 2)) == (expected_count, round(expected, 2))
    assert_same(expected_gradients, gradients)
    assert all(np.abs(value).max() > 0 for value in gradients.values())


@pytest.mark.parametrize(("dtype", "over"), [(mx.float32, {}), (mx.float32, {"tune": "full"}), (mx.bfloat16, {})])
def test_the_fused_form_of_a_gpu_is_the_same(
    dtype: mx.Dtype, over: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a CPU can tell: there `mx.fast.cross_entropy` is made of parts, which compute in the logits' type."""
    model = prepared("sft", **over)
    batch = collate(rows_of(model, store), store, model.config)
    model.set_dtype(dtype)
    kinds: list[mx.Dtype] = []
    fused, cross_entropy = [False], mx.fast.cross_entropy

    def seen(logits: mx.array, targets: mx.array) -> mx.array:
        kinds.append(logits.dtype)
        return cross_entropy(logits, targets)

    monkeypatch.setattr(train_loss, "_fused", lambda: fused[0])
    monkeypatch.setattr(train_loss, "CHUNK_BYTES", 4 * model.vocab_size * (batch.picks.size // 2))  # two chunks
    monkeypatch.setattr(mx.fast, "cross_entropy", seen)
    vectors = model.embed(batch.ids, batch.source, batch.patches, batch.grid, batch.num_tokens)
    inputs = model, vectors, batch.targets, batch.supervised, batch.picks

    def both() -> tuple[float, int, dict[str, np.ndarray], float]:
        return *found(model, batch), float(train_loss.loss_sum(*inputs, gradient=False))

    total, count, gradients, value = both()
    assert {*kinds} == {mx.float32}, "a CPU sums in float32"
    kinds.clear()
    fused[0] = True
    total_fused, count_fused, gradients_fused, value_fused = both()
    assert {*kinds} == {dtype} and count_fused == count
    rough = 1e-5 if dtype == mx.float32 else 1e-2
    assert (total_fused, value_fused, value) == pytest.approx((total,) * 3, rel=rough)
    assert_same(gradients, gradients_fused, 2e-4 if dtype == mx.float32 else 0.05)


def test_a_supervised_position_more_is_noticed(store: Store) -> None:
    model = prepared("pretrain")
    batch = collate(rows_of(model, store), store, model.config)
    free = int(np.flatnonzero(~np.array(batch.supervised))[0])
    picks = np.array(batch.picks)
    picks[0] = free
    supervised = np.array(batch.supervised).reshape(-1)
    supervised[free] = True
    wrong = replace(batch, picks=mx.array(picks), supervised=mx.array(supervised.reshape(batch.ids.shape)))
    assert abs(found(model, wrong)[0] - found(model, batch)[0]) > 0.01


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_one_batch_is_two_micro_batches(stage: str, store: Store) -> None:
    model = prepared(stage)
    rows = rows_of(model, store, 5)
    whole = found(model, collate(rows, store, model.config))
    parts = [found(model, collate(part, store, model.config)) for part in (rows[:1], rows[1:])]
    assert whole[1] == sum(count for _, count, _ in parts)
    assert whole[0] == pytest.approx(sum(loss for loss, _, _ in parts), rel=1e-5)
    assert_same(whole[2], {name: sum(part[2][name] for part in parts) for name in whole[2]})
    mean_of_means = np.mean([loss / count for loss, count, _ in parts])
    assert abs(mean_of_means - whole[0] / whole[1]) > 1e-3, "the parts must not weigh the same"


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_padding_never_contributes(stage: str, store: Store) -> None:
    model = prepared(stage)
    batch = collate(rows_of(model, store, 5), store, model.config)
    assert batch.padding > 0.05
    clean = found(model, batch)
    ids, targets = np.array(batch.ids), np.array(batch.targets)
    for row, length in enumerate(batch.lengths):
        ids[row, length:], targets[row, length - 1 :] = 7, 9
    patches, grid = np.array(batch.patches), np.array(batch.grid)
    for number, (height, width) in enumerate(grid):
        patches[number, height * width :] = 100.0
    stored = {"patches": mx.array(patches)}
    dirty = found(model, replace(batch, ids=mx.array(ids), targets=mx.array(targets), stored=stored))
    assert dirty[0] == pytest.approx(clean[0], rel=1e-5)
    assert_same(clean[2], dirty[2])


def test_only_supervised_positions_reach_the_head(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("pretrain")
    batch = collate(rows_of(model, store), store, model.config)
    shapes: list[tuple[int, ...]] = []
    logits = Llama3V.logits

    def seen(self: Llama3V, hidden: mx.array) -> mx.array:
        shapes.append(hidden.shape)
        return logits(self, hidden)

    monkeypatch.setattr(Llama3V, "logits", seen)
    found(model, batch)
    assert {*shapes} == {(batch.picks.size, model.config.hidden_size)}
    assert batch.picks.size < batch.ids.size / 2


def test_frozen_inputs_are_made_outside_the_gradient(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("sft")
    batch = collate(rows_of(model, store), store, model.config)
    inside: list[bool] = []
    transformed = [False]
    value_and_grad, embed = mx.value_and_grad, Llama3V.embed

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            transformed[0] = True
            try:
                return value_and_grad(function)(*args)
            finally:
                transformed[0] = False

        return call

    def seen(self: Llama3V, *args: Any) -> mx.array:
        inside.append(transformed[0])
        return embed(self, *args)

    monkeypatch.setattr(mx, "value_and_grad", watched)
    monkeypatch.setattr(Llama3V, "embed", seen)
    found(model, batch)
    found(prepared("pretrain"), batch)
    assert inside == [False, True]


def test_the_projector_gradient_agrees_with_finite_differences(store: Store) -> None:
    model = prepared("pretrain")
    batch = collate(rows_of(model, store, 2), store, model.config)
    _, _, gradients = found(model, batch)
    bias = model.projector.body.linear_out.bias
    for index in (0, 5):
        step = mx.zeros_like(bias)
        step[index] = 0.02
        ends = []
        for sign in (1, -1):
            model.projector.body.linear_out.bias = bias + sign * step
            ends.append(found(model, batch)[0])
        model.projector.body.linear_out.bias = bias
        slope = (ends[0] - ends[1]) / 0.04
        assert slope == pytest.approx(float(gradients["projector.body.linear_out.bias"][index]), rel=0.05, abs=0.05)

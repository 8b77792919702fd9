"""The memory of a step before it starts, beside what MLX reports."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from benchmarks.memory import LLAMA3_8B, WAYS, llama3_8b, measure
from mlx_llama3v import plan
from mlx_llama3v.config import ProjectorConfig
from mlx_llama3v.errors import RunError
from mlx_llama3v.platform import device_name
from mlx_llama3v.projector import Projector
from mlx_llama3v.tensors import parameters
from mlx_llama3v.train import memory
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.lora import prepare
from mlx_llama3v.train.memory import training_job
from tests.tiny_model import tiny_model

SIZE = (128, 4, 512, 4000, 4, 256)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_estimate_is_what_a_step_takes(stage: str) -> None:
    peaks = []
    for recompute in (False, True):
        peak, job = measure(SIZE, stage, recompute)
        assert plan.training_memory(job).total == pytest.approx(peak, rel=0.1)
        peaks.append(peak - job.weights)
    assert peaks[1] < 0.6 * peaks[0], "blocks that are computed again are kept all the same"
    gc.collect()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_knows_every_way_of_tuning(way: str, recompute: bool) -> None:
    if recompute and "lora_dropout" in WAYS[way]:
        pytest.skip("refused: blocks would be computed again with another mask")
    peak, job = measure(SIZE, "sft", recompute, begins=0.8, **WAYS[way])
    assert plan.training_memory(job).total == pytest.approx(peak, rel=0.1)
    gc.collect()


@pytest.mark.skipif(device_name() != "cpu", reason="fitted on a CPU")
@pytest.mark.parametrize("slices", [16, 48])
@pytest.mark.parametrize(
    "kind", [ProjectorConfig("attention", 256, 64, 128, num_heads=4), ProjectorConfig("mlp", 256, 384)]
)
def test_the_estimate_knows_what_a_projector_takes(kind: ProjectorConfig, slices: int) -> None:
    """It grows with the number of slices, not with its square; of scores a few parts of 4 MB are there at a time."""
    projector, patches = Projector(kind), mx.random.normal((slices, 729, kind.in_dim)).astype(mx.float16)
    grid = mx.full((slices, 2), 27, mx.int32)
    mx.eval(projector.parameters(), patches, grid)

    def loss(values: Any) -> mx.array:
        projector.update(values)
        return projector(patches.astype(mx.float32), grid, kind.num_tokens((27, 27))).sum()

    gc.collect()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    gradients = mx.grad(loss)(projector.trainable_parameters())
    mx.eval(gradients)
    learned = sum(value.nbytes for value in parameters(projector).values())
    taken = mx.get_peak_memory() - held - learned
    said = memory.projection(kind, slices, 729, 4, learns=True, scores=False)
    assert said["projector"] + said["projecting"] + 4 * patches.size == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_learns_is_reckoned_before_it_is_there(dtype: mx.Dtype) -> None:
    """Numbers and bytes are those that come, and a decoder that becomes float32 computes in its own type."""
    for settings in ({"stage": "pretrain"}, {"tune_projector": True}, *WAYS.values()):
        config = TrainConfig(**{"stage": "sft", "batch_size": 2, **settings}).resolved()
        model = tiny_model()
        model.set_dtype(dtype)
        job = training_job(model, config, 64)
        learns = prepare(model, config)
        size = sum(value.nbytes for value in parameters(model).values())
        assert (job.learned, job.weights, job.width) == (learns.count, size, dtype.size), settings
        assert job.updated == job.learned, "few arrays are updated at once"


def test_of_many_arrays_few_are_updated_at_once() -> None:
    """A step of `--tune full` makes all weights anew, but of 12 blocks not all beside the old ones."""
    peak, job = measure((128, 12, 256, 2000, 1, 32), "sft", True, tune="full")
    assert job.updated < 0.6 * job.learned
    assert plan.training_memory(job).total == pytest.approx(peak, rel=0.05)
    gc.collect()


def test_a_batch_is_no_larger_than_is_of_use() -> None:
    def rows(length: int, count: int = 100) -> Any:
        return [range(length)] * count

    assert [memory.rows_of_use(rows(length)) for length in (3000, 600, 512, 511, 100, 5)] == [8, 8, 8, 16, 64, 256]
    assert memory.rows_of_use([range(5), range(4000)]) == 8 and memory.rows_of_use(rows(5, 1)) == 256


def test_ranks_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds its part; so where memory decides, there are as many rows more as there are ranks."""
    model = tiny_model()
    rows: Any = [range(600)] * 9
    config = TrainConfig(stage="pretrain", batch_size=6).resolved()
    assert [training_job(model, config, 64, ranks=ranks).rows for ranks in (1, 2, 4, 9)] == [6, 3, 2, 1]

    def fitted(ranks: int, **over: Any) -> int:
        return memory.fitted(replace(config, batch_size=0, **over), model, rows, rows[0], ranks).batch_size

    monkeypatch.setattr(memory, "job_of", lambda model, config, row: training_job(model, config, len(row)))
    monkeypatch.setattr(memory, "memory_limit", lambda: 1 << 40)
    assert [fitted(ranks) for ranks in (1, 2, 3)] == [8, 16, 24]
    assert [fitted(ranks, rows_per_step=8) for ranks in (1, 2, 4)] == [8, 8, 8]
    one = plan.training_memory(training_job(model, replace(config, batch_size=2), 600)).total
    monkeypatch.setattr(memory, "memory_limit", lambda: round(one / 0.75) + 1)
    assert [fitted(ranks) for ranks in (1, 2)] == [2, 4]


def test_the_largest_batch_fits_three_quarters() -> None:
    job = llama3_8b(True, "sft")
    for size in (16, 24, 36, 64):
        rows = plan.largest_batch(job, size * 10**9)
        assert plan.training_memory(replace(job, rows=rows)).total <= 0.75 * size * 1e9
        assert plan.training_memory(replace(job, rows=2 * rows)).total > 0.75 * size * 1e9
    assert plan.largest_batch(job, 10**12, most=6) == 4
    with pytest.raises(RunError, match="one row of 1024 tokens needs about 1"):
        plan.largest_batch(llama3_8b(False, "sft"), 16 * 10**9)


def test_memory_grows_as_it_should() -> None:
    job = llama3_8b(False, "sft")
    one, long, wide = (plan.training_memory(j) for j in (job, replace(job, length=2048), replace(job, width=4)))
    assert one.weights == long.weights > 4e9 and long.activations > 2 * one.activations
    assert wide.activations > 1.8 * one.activations
    kept = 2 * 1024 * 4 * LLAMA3_8B.intermediate * LLAMA3_8B.layers
    assert plan.training_memory(replace(job, recompute=True)).activations < one.activations - kept
    assert plan.training_memory(replace(job, learned=10**9)).learning == 16 * 10**9
    assert plan.memory_limit() > 1 << 28

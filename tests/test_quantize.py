"""Quantized conversion: bits, modes, what the probe says, and that nothing half-made is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama3v.checkpoint import load_config, load_model
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.weights.convert import QuantConfig, convert
from mlx_llama3v.weights.probe import logits
from mlx_llama3v.weights.vlm import convert_vlm
from tests.hf_llama import LLAMA3_SCALING, make_llama
from tests.hf_llava import make_llava
from tests.hf_siglip import make_siglip


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("hf"))


def test_more_bits_change_less(llava: Path, tmp_path: Path) -> None:
    changes, sizes = [], []
    for bits in (2, 3, 4, 5, 6, 8):
        report = convert_vlm(llava, tmp_path / f"q{bits}", quantize=QuantConfig(bits, 32))
        assert report.probe is not None
        changes.append(report.probe.change)
        sizes.append(report.bits_per_weight)
        load_model(tmp_path / f"q{bits}")
    assert changes == sorted(changes, reverse=True) and sizes == sorted(sizes)
    assert changes[-1] < 0.05 < changes[0]


def test_mxfp4_is_read_back(llava: Path, tmp_path: Path) -> None:
    report = convert_vlm(llava, tmp_path / "m", quantize=QuantConfig(4, 32, "mxfp4"))
    assert report.probe is not None and 0 < report.probe.change < 1
    assert load_config(tmp_path / "m").quantization == {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    held = read_tensors(tmp_path / "m")
    scales = held["language_model.model.layers.0.mlp.up_proj.scales"]
    assert scales.dtype == mx.uint8
    assert not [name for name in held if name.startswith(("vision_tower", "projector")) and "scales" in name]
    assert np.isfinite(np.array(load_model(tmp_path / "m")(mx.array([[1, 2, 3]])))).all()


@pytest.mark.parametrize(
    ("bits", "group", "mode"), [(7, 64, "affine"), (4, 64, "mxfp4"), (3, 32, "mxfp4"), (4, 32, "x")]
)
def test_settings_that_do_not_exist(bits: int, group: int, mode: str) -> None:
    with pytest.raises(CheckpointError, match=r"mxfp4|7 bits|'x'"):
        QuantConfig(bits, group, mode)


@pytest.mark.parametrize("tie", [False, True])
def test_the_probe_runs_the_model_itself(tie: bool, tmp_path: Path) -> None:
    """Block by block, the logits are those of the whole decoder, quantized or not."""
    llm = make_llama(tmp_path / "llm", tie=tie, rope_scaling=LLAMA3_SCALING)
    vision = make_siglip(tmp_path / "vision")
    for quantize in (None, QuantConfig(4, 32)):
        target = tmp_path / f"{quantize}"
        report = convert(vision, llm, target, quantize=quantize)
        assert (report.probe is None) == (quantize is None)
        ids = mx.array([[300, 5, 9, 200, 17]])
        found = logits(read_tensors(target, ("language_model.",)), load_config(target), ids)
        assert np.abs(np.array(found) - np.array(load_model(target)(ids))[0]).max() < 1e-4


def test_a_killed_conversion_leaves_no_model_directory(llava: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    code = (
        "import sys, time\n"
        "from mlx_llama3v.weights.vlm import convert_vlm\n"
        "def slow(done, total):\n    print(done, flush=True)\n    time.sleep(0.2)\n"
        f"convert_vlm({str(llava)!r}, {str(target)!r}, shard_bytes=20000, progress=slow)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not target.exists() and (tmp_path / ".model.partial").is_dir()
    convert_vlm(llava, target)  # the next run clears what was left
    assert load_config(target) and not (tmp_path / ".model.partial").exists()


def test_an_error_in_the_middle_leaves_nothing(llava: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_vlm(llava, tmp_path / "model", progress=stop)
    assert list(tmp_path.iterdir()) == []

"""The fourteen traps of SigLIP + Llama checkpoints that silently make a wrong model, and the test of each.

1   rope in one spelling only          test_convert.test_trap_1_rope_parameters_only (in),
                                       test_export_hf.test_what_other_readers_need_is_in_the_config (out)
2   tied head by default               test_convert.test_trap_2_head_is_untied_unless_the_config_says_so,
                                       test_convert.test_trap_2_tied_head_in_the_file_is_dropped
3   the tower's GELU                   test_convert.test_trap_3_gelu_is_the_tanh_form
4   the projector's GELU               here: test_trap_4_the_projector_takes_the_erf_form
5   before or after post_layernorm     test_convert.test_trap_5_features_precede_the_post_layernorm,
                                       parity.test_hf_llava.test_the_unused_last_block_does_not_matter,
                                       here: test_trap_5_minicpm_reads_after_the_norm
6   the select strategy                parity.test_hf_llava.test_logits_and_greedy_answer ("strategy default"),
                                       here: test_trap_6_the_default_strategy_drops_a_patch,
                                       test_export_hf.test_what_other_readers_need_is_in_the_config
7   MiniCPM's strip                    parity.test_minicpm.test_a_perturbed_weight_and_the_other_mode_show
8   prompts that are not Llama-3's     parity.test_bunny.test_the_prompt_is_vicunas,
                                       parity.test_vila.test_logits_and_greedy_answer
9   three prefixes of one tower        test_convert.test_trap_9_three_prefix_layouts_are_one_tower,
                                       parity.test_hf_llava.test_three_key_layouts
10  a text-only load taken for one     here: test_trap_10_a_model_without_its_tower_is_refused
11  vision_config popped in saving     test_convert.test_trap_11_vision_config_survives_saving
12  max_kv_size ignored                test_inference.test_the_context_is_a_limit (the session counts, not the cache)
13  two <|begin_of_text|>              test_chat_template.test_the_layout_writes_what_the_template_writes,
                                       test_export_hf.test_the_exported_prompt_has_one_bos_and_our_markers
14  hidden_act for llama.cpp           test_export_gguf.test_trap_14_use_gelu_is_the_tanh_form,
                                       test_llama_cpp.test_without_use_gelu_the_features_are_others
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.inference import load
from mlx_llama3v.vision.families import make_encoder
from mlx_llama3v.weights.vlm import convert_vlm
from tests.family_parity import gap, prompt_logits
from tests.hf_edit import copy, edit
from tests.hf_llava import make_llava, picture, reference

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What does the sign say?"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("hf"))


def test_every_test_that_is_named_above_exists() -> None:
    for module, name in re.findall(r"([\w.]+)\.(test_\w+)", __doc__ or ""):
        file = HERE / f"{module.replace('.', '/')}.py"
        assert f"def {name}(" in file.read_text(), f"{module}.{name}"
    for name in re.findall(r"here: (test_\w+)", __doc__ or ""):
        assert name in globals()
    assert re.findall(r"^(\d+) ", __doc__ or "", re.MULTILINE) == [str(n) for n in range(1, 15)]


def test_trap_4_the_projector_takes_the_erf_form(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_vlm(llava, tmp_path / "model")
    image = picture(tmp_path / "a.png")
    expected = reference(llava, image, QUESTION).logits
    right = gap(prompt_logits(load(tmp_path / "model"), image, QUESTION), expected)
    monkeypatch.setattr("mlx_llama3v.projector.nn.gelu", nn.gelu_approx)
    wrong = gap(prompt_logits(load(tmp_path / "model"), image, QUESTION), expected)
    assert right <= 1e-4 < wrong  # the bound of every parity test tells the two apart


def test_trap_5_minicpm_reads_after_the_norm(tmp_path: Path) -> None:
    from tests.parity.test_minicpm import Reference

    source = Reference(tmp_path / "words").write(tmp_path / "hf", "minicpmv")
    config = convert_vlm(source, tmp_path / "model").config
    assert config.vision_feature_norm and config.vision_feature_layer == -1
    image = picture(tmp_path / "a.png")
    encoder = load(tmp_path / "model").encoder
    assert encoder is not None
    bare = make_encoder(encoder.tower, replace(config, vision_feature_norm=False)).embed(image)
    assert np.abs(bare.patches - encoder.embed(image).patches).max() > 0.1


def test_trap_6_the_default_strategy_drops_a_patch(tmp_path: Path) -> None:
    source = make_llava(tmp_path / "hf", strategy="default")
    convert_vlm(source, tmp_path / "model")
    config = load_config(tmp_path / "model")
    assert config.projector_config.num_tokens((4, 4)) == 15
    image = picture(tmp_path / "a.png")
    assert len(load(tmp_path / "model").encoder.embed(image).patches) == 16  # type: ignore[union-attr]


def test_trap_10_a_model_without_its_tower_is_refused(llava: Path, tmp_path: Path) -> None:
    def blind(weights: dict[str, mx.array]) -> None:
        for name in [name for name in weights if "vision_tower" in name]:
            weights.pop(name)

    with pytest.raises(CheckpointError, match="missing vision_tower"):
        convert_vlm(edit(copy(llava, tmp_path / "blind"), blind), tmp_path / "model")

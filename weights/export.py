"""A model directory, with a run on top where asked, as a Hugging Face checkpoint: the work of `export --format hf`.

LlavaForConditionalGeneration has neither our markers nor several slices. The markers become rows of the token
embedding, at the reserved ids that stand for them; what the format has no place for (text tower, pooling head, the
rows that the markers replaced) is kept in `llama3v/`, so that converting back gives the same model, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_llama3v.checkpoint import check_run, load_run, read_model
from mlx_llama3v.config import ModelConfig, TilingConfig
from mlx_llama3v.directory import LEGAL_FILES, TOKENIZER_FILES, write_directory
from mlx_llama3v.durable import sync
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.hub import resolve
from mlx_llama3v.model import Llama3V
from mlx_llama3v.tensors import (
    SHARD_BYTES,
    parameters,
    read_json,
    read_tensors,
    save_safetensors_atomic,
    write_shards,
    write_text,
)
from mlx_llama3v.text.tokens import Tokens, load_tokenizer, reserved_ids
from mlx_llama3v.weights.convert import drain, matching
from mlx_llama3v.weights.fuse import merge, with_run
from mlx_llama3v.weights.hf_files import chat_template, llava_config, processor_files

KEPT = "llama3v"  # the sub-folder with what the format has no place for
_EMBEDDING = "language_model.model.embed_tokens.weight"
TOWERS = ("vision_tower.", "text_tower.", "logit_")


def open_model(model_dir: str | Path, run: str | Path | None) -> tuple[Path, Llama3V]:
    """A model directory with the adapters of a run merged into it; not quantized. Raises CheckpointError."""
    source = resolve(model_dir).resolve()
    model = read_model(source)
    if model.config.quantization:
        raise CheckpointError(
            f"{source} is quantized; export the model directory that was converted without -q, or what `fuse "
            "--dequantize` makes of this one and a run."
        )
    if run is not None:
        check_run(source, run)
        load_run(model, run)
        decoder = model.language_model
        merged = [(name, merge(module)) for name, module in decoder.named_modules() if hasattr(module, "fuse")]
        decoder.update_modules(tree_unflatten(merged))
        model.config = with_run(model.config, run)
    return source, model


def export_hf(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    run: str | Path | None = None,
    squash: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a LlavaForConditionalGeneration directory; returns its absolute path.

    `squash` exports a model that splits pictures all the same: the result sees one squashed square. Raises
    CheckpointError for a model that the format cannot hold, before anything is written.
    """
    source, model = open_model(model_dir, run)
    config = replace(model.config, tiling=TilingConfig("squash", 0)) if squash else model.config
    check_llava(config, source)
    tokens = Tokens.load(source, config.marker_ids, config.eos_token_ids, config.prompt_layout)
    image_id = image_token(source, config)
    image = tokens.decode([image_id], special=True)
    theirs, kept = split({**read_tensors(source, TOWERS), **parameters(model)}, config)
    del model  # or a tensor's memory would not be free once it is written
    tie = "language_model.lm_head.weight" not in theirs
    dtype = str(theirs[_EMBEDDING].dtype).removeprefix("mlx.core.")
    act = "gelu" if config.projector_config.kind == "mlp" else "linear"
    texts = {
        "config.json": json.dumps(llava_config(config, image_id, dtype=dtype, tie=tie, act=act), indent=2) + "\n",
        "chat_template.jinja": chat_template(config.prompt_layout, tokens, image),
        **processor_files(config, image),
        "generation_config.json": json.dumps(_generation(config, tokens), indent=2) + "\n",
    }
    path = source / "tokenizer_config.json"
    tokenizer = read_json(path) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer = {k: v for k, v in tokenizer.items() if k not in ("chat_template", "auto_map", "processor_class")}
    texts["tokenizer_config.json"] = json.dumps({**tokenizer, "processor_class": "LlavaProcessor"}, indent=2) + "\n"
    copies = dict(matching(source, (*TOKENIZER_FILES, *LEGAL_FILES)))
    with write_directory(out_dir) as partial:
        write_shards(partial, drain(theirs), shard_bytes)
        (partial / KEPT).mkdir()
        if (source / "siglip").is_dir():
            copytree(source / "siglip", partial / KEPT / "siglip")
        save_safetensors_atomic(partial / KEPT / "kept.safetensors", kept)
        write_text(partial / KEPT / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        for name, file in copies.items():
            if name not in texts and not name.startswith("chat_template"):
                copyfile(file, partial / name)
                sync(partial / name)
        for name, text in texts.items():
            write_text(partial / name, text)
    return Path(out_dir).expanduser().resolve()


def check_llava(config: ModelConfig, where: Path) -> None:
    """Raise CheckpointError, in one sentence, for a model that LlavaForConditionalGeneration cannot hold."""
    kind = config.projector_config.kind
    if kind not in ("linear", "mlp"):
        raise CheckpointError(
            f"{where} has a projector of kind {kind}, which the format has not; linear and mlp do: `convert "
            "--projector mlp`, and train that."
        )
    check_square(config, where, ("squash",))


def check_square(config: ModelConfig, where: Path, modes: tuple[str, ...]) -> None:
    """Raise CheckpointError for a model that sees more than one native square a picture, in a tiling of `modes`."""
    if config.vision_feature_norm or config.vision_mode != "native":
        raise CheckpointError(f"{where} runs its tower in a way ({config.vision_mode}) that the format has not.")
    if config.patch_pool > 1:
        raise CheckpointError(
            f"{where} pools {config.patch_pool} x {config.patch_pool} patches, which the format has not."
        )
    if config.tiling.mode not in modes:
        raise CheckpointError(
            f"{where} takes pictures as {config.tiling.mode}, while the format sees one squashed square; "
            "use --squash to export it so all the same (a model made by `convert --tiling squash` needs it not)."
        )


def image_token(source: Path, config: ModelConfig) -> int:
    """The id that stands for a visual token: the tokenizer's own <image>, else a reserved one below the markers."""
    tokenizer = load_tokenizer(source)
    named = tokenizer.token_to_id("<image>")
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if named in special:
        return int(named)
    free = [i for i in reserved_ids(tokenizer) if i not in config.marker_ids]
    if not free:
        raise CheckpointError(f"{source}: the tokenizer has no reserved token left for <image>.")
    return free[-1]


def _generation(config: ModelConfig, tokens: Tokens) -> dict[str, Any]:
    """What transformers' `generate` needs for our greedy answer: it ends where ours does, and says nothing else."""
    ends: dict[str, Any] = {"bos_token_id": tokens.bos, "eos_token_id": sorted(tokens.stop), "do_sample": False}
    return {**ends, "suppress_tokens": list(tokens.unsaid(config.text_config["vocab_size"]))}


def split(ours: Mapping[str, mx.array], config: ModelConfig) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Tensors under the classic LLaVA names, and those that have no place there under ours."""
    theirs: dict[str, mx.array] = {}
    kept: dict[str, mx.array] = {}
    for name, value in ours.items():
        if name == "projector.markers" or name.startswith(("vision_tower.head.", "text_tower.", "logit_")):
            kept[name] = value
        elif name.startswith("vision_tower."):
            if name.endswith("patch_embedding.weight"):
                side = config.vision_config.patch_size
                value = value.reshape(value.shape[0], side, side, -1).transpose(0, 3, 1, 2)
            theirs["vision_tower.vision_model." + name.removeprefix("vision_tower.")] = value
        elif name.startswith("projector.body.linear."):
            theirs["multi_modal_projector.linear_1." + name.rpartition(".")[2]] = value
        elif name.startswith("projector.body."):
            theirs["multi_modal_projector." + name.removeprefix("projector.body.")] = value
        else:
            theirs[name] = value
    if config.projector_config.kind == "linear":  # the identity behind an activation that does nothing
        width = config.projector_config.out_dim
        theirs["multi_modal_projector.linear_2.weight"] = mx.eye(width)
        theirs["multi_modal_projector.linear_2.bias"] = mx.zeros((width,))
    if config.prompt_layout.markers:
        table, at = theirs[_EMBEDDING], mx.array(config.marker_ids)
        kept["marker_rows"] = table[at]
        theirs.setdefault("language_model.lm_head.weight", table)  # a tied head must not see the markers
        theirs[_EMBEDDING] = _with_rows(table, at, ours["projector.markers"].astype(table.dtype))
    return theirs, kept


def _with_rows(table: mx.array, at: mx.array, rows: mx.array) -> mx.array:
    changed = mx.array(table)
    changed[at] = rows
    return changed


def kept_config(directory: Path) -> ModelConfig | None:
    """The configuration of the model that a checkpoint was exported from; None where it was not exported here."""
    path = directory / KEPT / "config.json"
    return ModelConfig.from_dict(read_json(path), str(path)) if path.is_file() else None


def restore(directory: Path, found: dict[str, mx.array]) -> tuple[ModelConfig, dict[str, mx.array]] | None:
    """Our tensors made whole again with what `export_hf` kept beside its weights; None where it kept nothing."""
    config = kept_config(directory)
    if config is None:
        return None
    kept = read_tensors(directory / KEPT)
    whole = {**found, **kept}
    if config.projector_config.kind == "linear":
        for name in ("weight", "bias"):
            whole[f"projector.body.linear.{name}"] = whole.pop(f"projector.body.linear_1.{name}")
            whole.pop(f"projector.body.linear_2.{name}")
    if config.prompt_layout.markers:
        table, at = whole[_EMBEDDING], mx.array(config.marker_ids)
        rows, markers = table[at], whole["projector.markers"]
        if not mx.array_equal(rows, markers.astype(table.dtype)).item():  # trained further elsewhere
            whole["projector.markers"] = rows.astype(markers.dtype)
        whole[_EMBEDDING] = _with_rows(table, at, whole.pop("marker_rows"))
        if config.text_config["tie_word_embeddings"]:
            whole.pop("language_model.lm_head.weight", None)
    return config, whole

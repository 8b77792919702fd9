"""A model directory, with a run on top where asked, as two GGUF files for llama.cpp: `export --format gguf`.

`model-TYPE.gguf` is the decoder with its vocabulary and chat template; `mmproj-TYPE.gguf` the tower and the projector.
Our markers become rows of the token embedding at their reserved ids, as in the Hugging Face export. llama.cpp pads a
picture to a square where we squash it, so only square pictures look the same to both.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

from mlx_llama3v.config import ModelConfig, TilingConfig
from mlx_llama3v.directory import LEGAL_FILES, write_directory
from mlx_llama3v.durable import sync
from mlx_llama3v.tensors import parameters, read_tensors
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.version import __version__
from mlx_llama3v.weights.card import base_models
from mlx_llama3v.weights.convert import matching
from mlx_llama3v.weights.export import TOWERS, check_square, open_model, split
from mlx_llama3v.weights.gguf_file import check_type, package, write_gguf
from mlx_llama3v.weights.gguf_text import describe_text, describe_vocabulary, text_entries
from mlx_llama3v.weights.gguf_vision import check_mmproj, describe_vision, vision_entries
from mlx_llama3v.weights.hf_files import chat_template


def export_gguf(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    run: str | Path | None = None,
    squash: bool = False,
    type: str = "f16",
) -> Path:
    """Write the two files to a new directory; returns its absolute path.

    `type` (one of gguf_file.TYPES) is that of the decoder's matrices; tower and projector are float16, or float32 with
    "f32". `squash` exports a model that splits pictures all the same. Raises CheckpointError, before anything is
    written, for a model that llama.cpp cannot run and where the `gguf` package is missing.
    """
    package()
    check_type(type)
    source, model = open_model(model_dir, run)
    config = replace(model.config, tiling=TilingConfig("squash", 0)) if squash else model.config
    check_mmproj(config, source)
    check_square(config, source, ("squash", "pad"))
    tokens = Tokens.load(source, config.marker_ids, config.eos_token_ids, config.prompt_layout)
    theirs, _ = split({**read_tensors(source, TOWERS), **parameters(model)}, config)
    vision = {name: theirs.pop(name) for name in list(theirs) if not name.startswith("language_model.")}
    del model
    text = text_entries(theirs, config.text_config, type)
    vocabulary = int(config.text_config["vocab_size"])
    template = chat_template(config.prompt_layout, tokens, None)

    def describe(writer: Any) -> None:
        _describe(writer, config, source.name, type, "model")
        describe_text(writer, config.text_config)
        describe_vocabulary(writer, source, tokens, vocabulary, template)

    def describe_pictures(writer: Any) -> None:
        _describe(writer, config, source.name, type if type in ("f32", "bf16") else "f16", "mmproj")
        describe_vision(writer, config)

    with write_directory(out_dir) as partial:
        write_gguf(partial / f"model-{type}.gguf", "llama", describe, text)
        pictures = vision_entries(vision, config, type)
        write_gguf(partial / f"mmproj-{type}.gguf", "clip", describe_pictures, pictures)
        for name, file in matching(source, LEGAL_FILES):
            copyfile(file, partial / name)
        for file in partial.iterdir():
            sync(file)
    return Path(out_dir).expanduser().resolve()


def _describe(writer: Any, config: ModelConfig, name: str, type: str, kind: str) -> None:
    """What every GGUF file says of itself."""
    gguf = package()
    writer.add_type(kind)
    writer.add_name(name)
    made_of = " and ".join(base_models(config).values())
    writer.add_description(f"exported by mlx-llama3v {__version__}, made from {made_of}")
    names = {"f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[names.get(type, f"MOSTLY_{type.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

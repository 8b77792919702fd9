"""Parts of finished models for the parity tests: random torch towers and decoders, and greedy decoding in torch.

What joins the parts is written in each test from the facts about its family.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.family_parity import VISUAL, Answered
from tests.hf_llama import tiny_tokenizer, write_tokenizer


def enlarge(module: torch.nn.Module, matrices: float, embeddings: float = 1.0) -> Any:
    """Random weights large enough that an error anywhere reaches the output."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 1:
                weight.copy_(weight + 0.1 * torch.randn_like(weight))
            else:
                weight.mul_(embeddings if "embed" in name else matrices)
    return module.eval()


def tower(width: int = 64, layers: int = 3, image: int = 32, patch: int = 8, **over: Any) -> SiglipVisionModel:
    """A SigLIP vision tower; heads as the converter derives them."""
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=width + 7,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=image,
        patch_size=patch,
        vision_use_head=False,
        **over,
    )
    return enlarge(SiglipVisionModel(config), 1.5, 1.5)


def make_tokenizer(directory: Path, *extra: str) -> PreTrainedTokenizerFast:
    """The tiny Llama-3 tokenizer with further special tokens, written to `directory` and opened by transformers."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in extra])
    write_tokenizer(directory, tokenizer)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def decoder(vocabulary: int, hidden: int = 64, positions: int = 2048) -> LlamaForCausalLM:
    """A Llama with untied head."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        rms_norm_eps=1e-5,
        max_position_embeddings=positions,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
        tie_word_embeddings=False,
    )
    return enlarge(LlamaForCausalLM(config), 5, 10)


def llama_values(model: LlamaForCausalLM, **more: Any) -> dict[str, Any]:
    """The decoder's part of a config.json as files before transformers 5 have it."""
    config = model.config
    keys = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "rms_norm_eps", "max_position_embeddings"),
    )
    values = {key: getattr(config, key) for key in keys}
    return {**values, "rope_theta": 500000.0, "rope_scaling": None, "tie_word_embeddings": False, **more}


def save(directory: Path, config: dict[str, Any], parts: dict[str, Any]) -> Path:
    """config.json, and one file with the tensors of every part under its prefix."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {}
    for prefix, part in parts.items():
        held = part if isinstance(part, dict) else part.state_dict()
        tensors.update({prefix + name: value.detach().clone().contiguous() for name, value in held.items()})
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def ends_and_unsaid(tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> tuple[list[int], list[int]]:
    """What ends an answer; what none may hold: the eight highest reserved ids, names like `<image>`, and padding."""
    names = tokenizer.get_added_vocab()
    reserved = sorted(i for name, i in names.items() if "reserved_special" in name)
    beyond = [i for i in range(vocabulary) if i > reserved[-1]]
    foreign = [i for name, i in names.items() if not name.startswith("<|")]
    return [names["<|end_of_text|>"], names["<|eot_id|>"]], sorted({*reserved[-8:], *beyond, *foreign})


@torch.no_grad()
def decode(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pieces: list[torch.Tensor], count: int = 8
) -> Answered:
    """Ids [N] and vectors [N, D] in order -> the prompt's logits, and the greedy answer, computed anew a token."""
    table = model.get_input_embeddings()
    inputs = torch.cat([table(piece) if piece.ndim == 1 else piece for piece in pieces])[None]
    prompt = [token for piece in pieces for token in (piece.tolist() if piece.ndim == 1 else [VISUAL] * len(piece))]
    stop, unsaid = ends_and_unsaid(tokenizer, model.config.vocab_size)
    first = model(inputs_embeds=inputs).logits[0].numpy()
    last, found = first[-1], []
    for _ in range(count):
        last = last.copy()
        last[unsaid] = -np.inf
        token = int(last.argmax())
        if token in stop:
            break
        found.append(token)
        inputs = torch.cat([inputs, model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
        last = model(inputs_embeds=inputs).logits[0, -1].numpy()
    return Answered(first, found, prompt)


def mlp(width: int, hidden: int) -> torch.nn.Sequential:
    """mlp2x_gelu."""
    layers = torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden)
    return enlarge(torch.nn.Sequential(*layers), 4)


def pixels(image: Any, size: tuple[int, int]) -> torch.Tensor:
    """PIL bicubic to (width, height), scaled to [-1, 1]: [1, 3, H, W]."""
    from PIL import Image

    values = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    return torch.from_numpy((values - 0.5) / 0.5).permute(2, 0, 1)[None]

"""Tiny random LlavaForConditionalGeneration checkpoints with a SigLIP tower, as transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.family_parity import VISUAL, Answered, without_stop
from tests.hf_llama import LLAMA3_SCALING, tiny_tokenizer, write_tokenizer

PATCHES = 16  # 32 px / 8


def make_llava(
    directory: Path,
    *,
    layer: int = -2,
    strategy: str = "full",
    layers: int = 3,
    tie: bool = False,
    scaled: bool = True,
    head: bool = False,
    seed: int = 0,
    extra: Sequence[str] = ("<image>",),
    padding: int = 3,
) -> Path:
    """Write a model, its tokenizer (`extra` appended) and its processor files; `padding`: ids beyond the tokenizer."""
    import torch
    from tokenizers import AddedToken, Tokenizer
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in extra])
    write_tokenizer(directory, tokenizer)
    image, eot = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<|eot_id|>")
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=67,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        vision_use_head=head,
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tokenizer.get_vocab_size() + padding,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 500000.0, **(LLAMA3_SCALING if scaled else {"rope_type": "default"})},
        tie_word_embeddings=tie,
        bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        eos_token_id=eot,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=PATCHES - (strategy == "default"),
        tie_word_embeddings=tie,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name or "lm_head" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight)) if weight.ndim == 1 else weight.mul_(
                    10 if "embed" in name else 5
                )
            else:
                gain = 8 if "multi_modal" in name and weight.ndim > 1 else 1.5
                weight.copy_(gain * weight + 0.1 * torch.randn_like(weight))
    model.eval().save_pretrained(directory)
    pixels: dict[str, Any] = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    return directory


def picture(path: Path, width: int = 50, height: int = 41, seed: int = 0) -> Path:
    """A PNG of smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def llava_content(visual: str, pictures: int, question: str) -> str:
    """What LLaVA's users write: each picture and a new line, then the question."""
    return f"{visual}\n" * pictures + question


def reference(
    directory: Path,
    image: Path | Sequence[Path],
    question: str,
    max_tokens: int = 8,
    content: Callable[[str, int, str], str] = llava_content,
) -> Answered:
    """transformers' own answer; `content(visual tokens of a picture, pictures, question)` writes the user's turn."""
    import torch
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast, SiglipImageProcessorPil

    from tests.hf_family import ends_and_unsaid

    images = [image] if isinstance(image, Path) else list(image)
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    opened = [Image.open(path) for path in images]
    pixels = SiglipImageProcessorPil.from_pretrained(directory)(opened, return_tensors="pt")["pixel_values"]
    text = content("<image>" * model.config.image_seq_length, len(images), question)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    stop, unsaid = ends_and_unsaid(tokenizer, model.config.text_config.vocab_size)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0].numpy()
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=stop,
            suppress_tokens=unsaid,
        )
    shown = model.config.image_token_id
    prompt = [VISUAL if token == shown else token for token in ids[0].tolist()]
    return Answered(logits, without_stop(out[0, ids.shape[1] :].tolist(), frozenset(stop)), prompt)

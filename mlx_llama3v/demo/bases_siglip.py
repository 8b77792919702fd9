"""Train the bundled tiny SigLIP: both towers, pairwise sigmoid loss, on scenes drawn as it goes.

    python -m mlx_llama3v.demo.bases_siglip --output weights/tiny/siglip

PyTorch does the steps because it is about three times faster than MLX on a CPU; the loss is the same function as
`vision.siglip.sigmoid_loss` (a test compares them). The batch of step n is a pure function of (seed, n), and the
state is saved every few minutes, so a stopped run continues where it was. What it is shown is in pairs.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, SiglipConfig, SiglipModel

from mlx_llama3v.demo import bases, scenes
from mlx_llama3v.demo.pairs import PATCH, Seen, batch, choose_texts, statements, truth_matrix
from mlx_llama3v.demo.scenes import SIDE
from mlx_llama3v.demo.tokenizers import SIGLIP_LENGTH, write_siglip_tokenizer

WIDTH, LAYERS, HEADS, MLP = 128, 6, 4, 384
TEXT_LAYERS, TEXT_MLP = 2, 256


def config() -> SiglipConfig:
    """The tiny SigLIP's Hugging Face config; the vocabulary size is filled in from the tokenizer."""
    vision = {
        "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    text = {
        "hidden_size": WIDTH, "intermediate_size": TEXT_MLP, "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": SIGLIP_LENGTH,
        "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    return SiglipConfig(text_config=text, vision_config=vision)


def loss_terms(logits_per_text: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023) with known pairs. logits, truth [T, I]; truth is 1 where the text
    holds for the image, -1 where it does not, 0 where the image does not show it (no loss). A sum over texts,
    divided by the number of images: SigLIP's own normalization."""
    return -(torch.nn.functional.logsigmoid(logits_per_text * truth) * truth.abs()).sum() / truth.shape[1]


def look(model: SiglipModel, pictures: list[Seen]) -> torch.Tensor:
    """Embeddings of every view of pictures of one shape [V, width], in order: the tower once a picture, then its own
    pooling head once a view over the patches that the view has. For a whole picture that is `pooler_output`."""
    tower = model.vision_model
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2)
    hidden = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    most = max(len(picture.views) for picture in pictures)
    seen = torch.ones(len(pictures), most, hidden.shape[1], dtype=torch.bool)
    exists = torch.zeros(len(pictures), most, dtype=torch.bool)
    for index, picture in enumerate(pictures):
        seen[index, : len(picture.views)] = torch.from_numpy(np.stack([view.seen for view in picture.views]))
        exists[index, : len(picture.views)] = True
    head = tower.head
    q_weight, k_weight, v_weight = head.attention.in_proj_weight.chunk(3)
    q_bias, k_bias, v_bias = head.attention.in_proj_bias.chunk(3)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.float().unflatten(-1, (HEADS, -1)).transpose(1, 2)

    linear = torch.nn.functional.linear
    q = heads(linear(head.probe, q_weight, q_bias)).expand(len(pictures), -1, most, -1)
    k, v = heads(linear(hidden, k_weight, k_bias)), heads(linear(hidden, v_weight, v_bias))
    pooled = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
    pooled = head.attention.out_proj(pooled.transpose(1, 2).flatten(2)[exists])
    return pooled + head.mlp(head.layernorm(pooled))


class Trainer(bases.Trainer):
    """SigLIP's; see bases.py."""

    name, warm_up = "siglip", 200

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        write_siglip_tokenizer(Path(args.output), [*statements(), "and"])
        self.tokenizer = AutoTokenizer.from_pretrained(args.output)
        tiny = config()
        tiny.text_config.vocab_size = len(self.tokenizer)  # type: ignore[union-attr]
        self.model = SiglipModel._from_config(tiny, attn_implementation="eager")  # sdpa is slow in bfloat16 here
        with torch.no_grad():
            # A picture has up to thirty true statements, so its cosine with each is about 1/sqrt(30) at best.
            self.model.logit_scale.fill_(np.log(30.0))
            self.model.logit_bias.fill_(-6.0)
        scalars = [self.model.logit_scale, self.model.logit_bias]
        others = [p for p in self.model.parameters() if all(p is not scalar for scalar in scalars)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": others, "factor": 1.0, "weight_decay": 0.01},
                {"params": scalars, "factor": 10.0, "weight_decay": 0.0},
            ],
            lr=args.learning_rate,
            betas=(0.9, 0.98),
        )
        self.resume()

    def texts(self, texts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(
            texts, padding="max_length", max_length=SIGLIP_LENGTH, truncation=True, return_tensors="pt"
        )["input_ids"]
        return self.model.text_model(ids).pooler_output

    def logits_per_text(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        images = images / images.norm(dim=-1, keepdim=True)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        return texts @ images.T * self.model.logit_scale.exp() + self.model.logit_bias

    def loss(self) -> torch.Tensor:
        """Over both groups of pictures."""
        groups = batch(self.args.seed, self.step, self.args.small, self.args.large)
        views = [view for group in groups for picture in group for view in picture.views]
        rng = Random(f"texts-{self.args.seed}-{self.step}")
        texts = choose_texts(rng, views, self.args.texts)
        truth = torch.from_numpy(truth_matrix(texts, views))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bfloat16):
            images = torch.cat([look(self.model, group) for group in groups])
            statements = self.texts([" and ".join(text) for text in texts])
        return loss_terms(self.logits_per_text(images.float(), statements.float()), truth)

    @torch.no_grad()
    def evaluate(self, count: int = 512) -> dict[str, float]:
        """Share of unseen whole pictures or tiles whose best-scoring statement of a kind is the true one."""
        seed = self.args.seed + 1_000_000
        groups = [batch(seed, 0, count, 1)[0], *(batch(seed, step, 1, count // 8)[1] for step in range(12))]
        embedded = [(look(self.model, group), [view for seen in group for view in seen.views]) for group in groups]
        results = {}
        for name, (choices, kinds) in _probes().items():
            texts = self.texts(choices)
            right = total = 0
            for images, views in embedded[kinds]:
                best = self.logits_per_text(images, texts).argmax(0)
                for index, view in zip(best, views, strict=True):
                    if view.seen.all() and len(view.facts & set(choices)) == 1:
                        right, total = right + (choices[int(index)] in view.facts), total + 1
            results[name] = round(right / max(total, 1), 3)
        return results

    def export(self) -> None:
        """Write the Hugging Face checkpoint in float16 with its preprocessor config."""
        output = Path(self.args.output)
        model = SiglipModel(self.model.config)
        model.load_state_dict(self.model.state_dict())
        model.half().save_pretrained(output)
        values: dict[str, Any] = {
            "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor",
            "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 3,
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        }  # fmt: skip
        (output / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")


def _probes() -> dict[str, tuple[list[str], slice]]:
    """Closed choices of which exactly one is true (a classifier made of statements), and whether to put them to the
    whole pictures or to the tiles."""
    words = [f"the word {word.lower()}" for word in scenes.WORDS]
    numbers = [f"the number {number}" for number in scenes.NUMBERS]
    whole, tiles = slice(0, 1), slice(1, None)
    return {
        "word": (words, whole),
        "number": (numbers, whole),
        "sign's word": (words, tiles),
        "sign's number": (numbers, tiles),
        "count": ([f"{scenes.COUNTS[n]} shape{'' if n == 1 else 's'}" for n in range(5)], whole),
        "pair": ([f"a {c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES], whole),
        "tallest": ([f"the tallest bar is {colour}" for colour in scenes.COLOURS], whole),
    }


def main() -> None:
    """Command line; see the module's first lines."""
    small, large = (32, "whole small pictures a step"), (24, "overviews or tiles a step")
    texts = (128, "statements scored a step")
    args = bases.arguments(__doc__, "weights/tiny/siglip", 14000, 1.5e-3, small=small, large=large, texts=texts)
    Trainer(args).run()


if __name__ == "__main__":
    main()

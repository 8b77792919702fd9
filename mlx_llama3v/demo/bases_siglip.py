"""Train the bundled tiny SigLIP: both towers, pairwise sigmoid loss, on scenes drawn as it goes.

    python -m mlx_llama3v.demo.bases_siglip --output weights/tiny/siglip

PyTorch does the steps because it is about three times faster than MLX on a CPU; the loss is the same function as
`vision.siglip.sigmoid_loss` (a test compares them). The batch of step n is a pure function of (seed, n), and the
state is saved every few minutes, so a stopped run continues where it was. Each step sees whole small pictures and
either overviews or tiles of large ones, at the very shapes that `vision.tiling` will cut later. A caption is a short
statement; which statements hold for which pictures is known, so a pair is positive wherever the statement is
true, and left out of the loss where a slice does not show what would decide it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, SiglipConfig, SiglipModel

from mlx_llama3v.config import ImageConfig, TilingConfig, VisionConfig
from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.draw import render, sign_box
from mlx_llama3v.demo.scenes import SIDE, Scene
from mlx_llama3v.demo.tokenizers import SIGLIP_LENGTH, write_siglip_tokenizer
from mlx_llama3v.vision.image import cut
from mlx_llama3v.vision.tiling import Plan, plan

WIDTH, LAYERS, HEADS, MLP = 128, 6, 4, 384
TEXT_LAYERS, TEXT_MLP = 2, 256
PATCH = 8
VISION = VisionConfig(
    hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    image_size=SIDE, patch_size=PATCH,
)  # fmt: skip
TILING = TilingConfig()


class Seen(NamedTuple):
    """One training picture: pixels [H, W, 3], its true statements, and which families of statements it decides."""

    pixels: np.ndarray
    facts: frozenset[str]
    families: frozenset[str]


FAMILIES = {"things": scenes.thing_facts, "prints": scenes.print_facts, "bars": scenes.bar_facts}


def all_facts() -> dict[str, str]:
    """Every statement there is -> its family. Found by drawing lots of scenes: the sampler is the one source."""
    rng = Random(0)
    found: dict[str, str] = {}
    for _ in range(60_000):
        scene = scenes.sample(rng)
        for family, facts in FAMILIES.items():
            found.update(dict.fromkeys(facts(scene), family))
    return dict(sorted(found.items()))


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


def _small_scenes(rng: Random, count: int) -> list[Seen]:
    """Whole pictures of one common shape, area at most the tower's own or a little above."""
    area, aspect = SIDE**2 * rng.choice((rng.uniform(0.5, 1), 1, 1, 1.7)), 2 ** rng.uniform(-0.55, 0.55)
    size = {"width": round((area * aspect) ** 0.5), "height": round((area / aspect) ** 0.5)}
    kinds = rng.choices(("shapes", "print", "chart"), weights=(4, 5, 2), k=count)
    found = [replace(scenes.sample(rng, kind), **size) for kind in kinds]
    return [_seen(scene, _plan(scene), 0, frozenset(FAMILIES)) for scene in found]


def _sign_scenes(rng: Random, count: int) -> list[Seen]:
    """Overviews, or tiles, of large pictures of one common shape."""
    first = scenes.sample(rng, "sign")
    found = [replace(scenes.sample(rng, "sign"), width=first.width, height=first.height) for _ in range(count)]
    layout = _plan(first)
    if rng.random() < 0.3:
        return [_seen(scene, layout, 0, frozenset({"things", "bars"})) for scene in found]
    return [_tile(scene, layout, rng) for scene in found]


def _tile(scene: Scene, layout: Plan, rng: Random) -> Seen:
    """The tile with the sign, mostly; else any tile, of which it is known only that nothing is printed on it."""
    rows, cols = layout.layout.rows, layout.layout.cols
    x0, y0, x1, y1 = sign_box(scene)
    holder = int(y0 * rows / scene.height) * cols + int(x0 * cols / scene.width)
    whole = holder == int(y1 * rows / scene.height) * cols + int(x1 * cols / scene.width)
    index = holder if whole and rng.random() < 0.8 else rng.randrange(rows * cols)
    if index != holder:
        scene_facts = frozenset[str]()
    elif whole:
        scene_facts = frozenset(scenes.print_facts(scene))
    else:  # the sign is cut in two: say nothing about print
        return _seen(scene, layout, index + 1, frozenset({"bars"}))
    return _seen(scene, layout, index + 1, frozenset({"prints", "bars"}), scene_facts)


def _plan(scene: Scene) -> Plan:
    return plan(scene.width, scene.height, VISION, TILING)


def _seen(
    scene: Scene, layout: Plan, index: int, families: frozenset[str], facts: frozenset[str] | None = None
) -> Seen:
    if facts is None:
        facts = frozenset().union(*(FAMILIES[family](scene) for family in families))
    return Seen(cut(render(scene), layout, ImageConfig())[index], facts, families)


def batch(seed: int, step: int, small: int, large: int) -> list[list[Seen]]:
    """Two groups, each of one picture shape; a pure function of its arguments."""
    rng = Random(f"{seed}-{step}")
    return [_small_scenes(rng, small), _sign_scenes(rng, large)]


def choose_texts(rng: Random, seen: list[Seen], facts: dict[str, str], limit: int) -> list[tuple[str, ...]]:
    """Statements to score: some true ones of every picture, pairs of true ones, and random others."""
    texts: dict[tuple[str, ...], None] = {}
    for picture in seen:
        true = sorted(picture.facts)
        for fact in rng.sample(true, min(3, len(true))):
            texts[(fact,)] = None
        if len(true) > 1 and rng.random() < 0.3:
            texts[tuple(rng.sample(true, 2))] = None
    chosen = list(texts)
    rng.shuffle(chosen)
    others = [(fact,) for fact in rng.sample(list(facts), limit // 4)]
    return list(dict.fromkeys([*chosen[: limit - len(others)], *others]))


def truth_matrix(texts: list[tuple[str, ...]], seen: list[Seen], facts: dict[str, str]) -> np.ndarray:
    """[T, I] of 1 (true), -1 (false), 0 (the picture does not decide it)."""
    columns = []
    for picture in seen:
        column = []
        for text in texts:
            known = all(facts[part] in picture.families for part in text)
            column.append((1 if all(part in picture.facts for part in text) else -1) if known else 0)
        columns.append(column)
    return np.array(columns, dtype=np.float32).T


class Trainer:
    """Model, optimizer and step counter; everything needed to go on after a stop."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.facts = args, all_facts()
        self.work, self.step = Path(args.work), 0
        write_siglip_tokenizer(Path(args.output), [*self.facts, "and"])
        self.tokenizer = AutoTokenizer.from_pretrained(args.output)
        tiny = config()
        tiny.text_config.vocab_size = len(self.tokenizer)  # type: ignore[union-attr]
        self.model = SiglipModel._from_config(tiny, attn_implementation="sdpa")
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
        self._resume()

    def _resume(self) -> None:
        path = self.work / "siglip.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        temporary = self.work / "siglip.pt.tmp"
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step},
            temporary,
        )
        temporary.replace(self.work / "siglip.pt")

    def images(self, seen: list[Seen]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in seen])).permute(0, 3, 1, 2)
        return self.model.vision_model(pixels, interpolate_pos_encoding=True).pooler_output

    def texts(self, texts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(
            texts, padding="max_length", max_length=SIGLIP_LENGTH, truncation=True, return_tensors="pt"
        )["input_ids"]
        return self.model.text_model(ids).pooler_output

    def logits_per_text(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        images = images / images.norm(dim=-1, keepdim=True)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        return texts @ images.T * self.model.logit_scale.exp() + self.model.logit_bias

    def train_step(self) -> float:
        """One optimizer step over both groups of pictures."""
        groups = batch(self.args.seed, self.step, self.args.small, self.args.large)
        seen = [picture for group in groups for picture in group]
        rng = Random(f"texts-{self.args.seed}-{self.step}")
        texts = choose_texts(rng, seen, self.facts, self.args.texts)
        truth = torch.from_numpy(truth_matrix(texts, seen, self.facts))
        rate = self.args.learning_rate * self._schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        images = torch.cat([self.images(group) for group in groups])
        loss = loss_terms(self.logits_per_text(images, self.texts([" and ".join(t) for t in texts])), truth)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _schedule(self) -> float:
        """Linear warm-up over 200 steps, then a cosine to 2%."""
        if self.step < 200:
            return (self.step + 1) / 200
        share = min(1.0, (self.step - 200) / max(1, self.args.steps - 200))
        return float(0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * share)))

    @torch.no_grad()
    def evaluate(self, count: int = 192) -> dict[str, float]:
        """Share of unseen pictures whose best-scoring statement of a kind is the true one."""
        groups = batch(self.args.seed + 1_000_000, 1, count, count)
        groups[1] = [seen for step in range(9) for seen in batch(self.args.seed + 1_000_000, step, 1, 48)[1]]
        results = {}
        for name, choices in _probes().items():
            texts = self.texts(choices)
            right = total = 0
            for group in (groups[0], *([picture] for picture in groups[1])):
                rows = [p for p in group if len(p.facts & set(choices)) == 1]
                if rows:
                    best = self.logits_per_text(self.images(rows), texts).argmax(0)
                    right += sum(choices[int(b)] in p.facts for b, p in zip(best, rows, strict=True))
                    total += len(rows)
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


def _probes() -> dict[str, list[str]]:
    """Closed choices of which exactly one is true: a classifier made of statements."""
    numbers = [f"the number {n}" for n in range(10, 100)]
    return {
        "word": [f"the word {word.lower()}" for word in scenes.WORDS],
        "number": numbers,
        "count": [f"{scenes.COUNTS[n]} shape{'' if n == 1 else 's'}" for n in range(5)],
        "pair": [f"a {c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES],
        "tallest": [f"the tallest bar is {colour}" for colour in scenes.COLOURS],
    }


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="weights/tiny/siglip", help="where the checkpoint goes")
    parser.add_argument("--work", default="bases-work", help="where the state for resuming goes")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--small", type=int, default=80, help="whole small pictures a step")
    parser.add_argument("--large", type=int, default=64, help="overviews or tiles a step")
    parser.add_argument("--texts", type=int, default=320, help="statements scored a step")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    trainer = Trainer(parser.parse_args())
    started, losses = time.time(), []
    while trainer.step < trainer.args.steps:
        losses.append(trainer.train_step())
        if trainer.step % 50 == 0:
            rate = len(losses) and 50 / (time.time() - started)
            print(f"step {trainer.step} loss {np.mean(losses[-50:]):.3f} {rate:.2f} steps/s", flush=True)
            started = time.time()
        if trainer.step % 250 == 0:
            trainer.save()
            print("   ", trainer.evaluate(), flush=True)
            started = time.time()
    trainer.save()
    print(trainer.evaluate(count=512))
    trainer.export()


if __name__ == "__main__":
    main()

"""Train the bundled tiny Llama on text alone (see passages.py).

    python -m mlx_llama3v.demo.bases_llama --output weights/tiny/llama

A Llama-3 in miniature: grouped-query attention, RoPE base 500000, Llama-3's header format and reserved tokens. The
batch of step n is a pure function of (seed, n); the state is saved every few minutes and a stopped run continues.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.passages import Passage, notes, passage
from mlx_llama3v.demo.tokenizers import write_llama_tokenizer

WIDTH, LAYERS, HEADS, KV_HEADS, MLP = 128, 4, 4, 2, 384
IGNORE = -100


def corpus(seed: int = 0, count: int = 4000) -> list[str]:
    """Texts that the tokenizer is made from."""
    rng = Random(seed)
    texts: list[str] = []
    for _ in range(count):
        scene = scenes.sample(rng)
        texts += [scenes.caption(scene), notes(scene, rng)]
        texts += [text for qa in scenes.questions(scene) for text in (qa.question, qa.answer)]
    return [*texts, "system\n\nuser\n\nassistant\n\n"] + ["user\n\nassistant\n\n"] * count


class Trainer:
    """Model, optimizer and step counter; everything needed to go on after a stop."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.work, self.step = args, Path(args.work), 0
        if not (Path(args.output) / "tokenizer.json").exists():
            write_llama_tokenizer(Path(args.output), corpus())
        self.tokenizer = AutoTokenizer.from_pretrained(args.output)
        ids: Any = self.tokenizer.convert_tokens_to_ids
        self.bos, self.end, self.eot = map(ids, ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))
        self.header = {role: self._header(role) for role in ("user", "assistant")}
        self.model = LlamaForCausalLM._from_config(self._config(), attn_implementation="sdpa")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        path = self.work / "llama.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def _config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, vocab_size=len(self.tokenizer), max_position_embeddings=1024,
            rms_norm_eps=1e-5, tie_word_embeddings=True,
            initializer_range=WIDTH**-0.5,  # 0.02 is for wide models: attention would start too flat here
            bos_token_id=self.bos, eos_token_id=[self.end, self.eot],
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )  # fmt: skip

    def _header(self, role: str) -> list[int]:
        ids: Any = self.tokenizer.convert_tokens_to_ids
        text = self.tokenizer.encode(role, add_special_tokens=False)
        newlines = self.tokenizer.encode("\n\n", add_special_tokens=False)
        return [ids("<|start_header_id|>"), *text, ids("<|end_header_id|>"), *newlines]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def sequence(self, item: Passage) -> tuple[list[int], list[bool]]:
        """Ids and which of them are learnt, in the format that prompt.py lays out for pictures."""
        ids, learnt = [self.bos], [False]

        def add(tokens: list[int], learn: bool) -> None:
            ids.extend(tokens)
            learnt.extend([learn] * len(tokens))

        if not item.turns:
            for piece in item.description:
                add(self.encode(piece.text), piece.learnt)
            add([self.end], True)
            return ids, learnt
        for index, turn in enumerate(item.turns):
            add(self.header["user"], False)
            if index == 0:
                add(self.encode(item.description[0].text), False)
            add(self.encode(turn.question), True)  # a question names what the description holds: practice in looking up
            add([self.eot, *self.header["assistant"]], False)
            add([*self.encode(turn.answer), self.eot], True)
        return ids, learnt

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = Random(f"{self.args.seed}-{step}")
        rows = [self.sequence(passage(rng)) for _ in range(self.args.batch_size)]
        length = max(len(ids) for ids, _ in rows)
        ids = np.zeros((len(rows), length), dtype=np.int64)
        labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
        for index, (row, learnt) in enumerate(rows):
            ids[index, : len(row)] = row
            labels[index, : len(row)] = np.where(learnt, row, IGNORE)
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def train_step(self) -> float:
        ids, labels = self.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * self._schedule()
        loss = self.model(input_ids=ids, labels=labels).loss  # causal, right-padded: no mask needed
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _schedule(self) -> float:
        if self.step < 100:
            return (self.step + 1) / 100
        share = min(1.0, (self.step - 100) / max(1, self.args.steps - 100))
        return float(0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * share)))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Share of learnt tokens predicted rightly on unseen passages."""
        ids, labels = self.batch(10_000_000)
        best = self.model(input_ids=ids).logits[:, :-1].argmax(-1)
        known = labels[:, 1:] != IGNORE
        return float((best == labels[:, 1:])[known].float().mean())

    def save(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        temporary = self.work / "llama.pt.tmp"
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step},
            temporary,
        )
        temporary.replace(self.work / "llama.pt")

    def export(self) -> None:
        """Write the Hugging Face checkpoint in float16, with rope in both spellings."""
        output = Path(self.args.output)
        model = LlamaForCausalLM(self.model.config)
        model.load_state_dict(self.model.state_dict())
        model.half().save_pretrained(output)
        path = output / "config.json"
        values = json.loads(path.read_text())
        values.update(rope_theta=500000.0, rope_scaling=None)
        path.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="weights/tiny/llama", help="where the checkpoint goes")
    parser.add_argument("--work", default="bases-work", help="where the state for resuming goes")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    trainer = Trainer(parser.parse_args())
    started, losses = time.time(), []
    while trainer.step < trainer.args.steps:
        losses.append(trainer.train_step())
        if trainer.step % 50 == 0:
            rate = 50 / (time.time() - started)
            print(
                f"step {trainer.step} loss {np.mean(losses[-50:]):.3f} right {trainer.evaluate():.3f} {rate:.2f}/s",
                flush=True,
            )
            started = time.time()
        if trainer.step % 250 == 0:
            trainer.save()
    trainer.save()
    trainer.export()


if __name__ == "__main__":
    main()

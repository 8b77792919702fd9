"""Train the bundled tiny Llama on text alone (see passages.py).

    python -m mlx_llama3v.demo.bases_llama --output weights/tiny/llama

A Llama-3 in miniature: grouped-query attention, RoPE base 500000, Llama-3's header format and reserved tokens. The
batch of step n is a pure function of (seed, n); the state is saved every few minutes and a stopped run continues.

Where a passage has a glimpse (words on the grids of a picture's tokens), a position's vector is the sum of its
words' embeddings, each with a random weight, and noise: several words said at once and not quite purely, as a
projector will say them. The markers around it are new random vectors each time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mlx_llama3v.demo import bases, scenes
from mlx_llama3v.demo.passages import Glimpse, Passage, notes, passage
from mlx_llama3v.demo.tokenizers import write_llama_tokenizer

WIDTH, LAYERS, HEADS, KV_HEADS, MLP = 128, 4, 4, 2, 384
IGNORE = -100
SPREAD = WIDTH**-0.5  # standard deviation of fresh embeddings
MARKER = -1  # stands for a marker where a row says what each position's words are


class Row(NamedTuple):
    """One passage. `words` is what positions without a token say: MARKER, or the ids whose embeddings are summed."""

    ids: list[int]
    learnt: list[bool]
    words: dict[int, list[int]]


def corpus(seed: int = 0, count: int = 4000) -> list[str]:
    """Texts that the tokenizer is made from."""
    rng = Random(seed)
    texts: list[str] = []
    for _ in range(count):
        scene = scenes.sample(rng)
        texts += [scenes.caption(scene), notes(scene, rng)]
        texts += [text for qa in scenes.questions(scene) for text in (qa.question, qa.answer)]
    return [*texts, "system\n\nuser\n\nassistant\n\n"] + ["user\n\nassistant\n\n"] * count


class Trainer(bases.Trainer):
    """Llama's; see bases.py."""

    name, warm_up = "llama", 100

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
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
        self.resume()

    def _config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, vocab_size=len(self.tokenizer), max_position_embeddings=1024,
            rms_norm_eps=1e-5, tie_word_embeddings=True,
            initializer_range=SPREAD,  # 0.02 is for wide models: attention would start too flat here
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

    def word(self, text: str) -> list[int]:
        """Ids of a word inside a sentence."""
        return self.encode(text if text.isdigit() else f" {text}")

    def row(self, item: Passage) -> Row:
        """Ids and which of them are learnt, in the format that prompt.py lays out for pictures."""
        row = Row([self.bos], [False], {})

        def add(tokens: list[int], learn: bool = False) -> None:
            row.ids.extend(tokens)
            row.learnt.extend([learn] * len(tokens))

        def say(words: list[int]) -> None:
            row.words[len(row.ids)] = words
            add([self.bos])

        def look(seen: Glimpse) -> None:
            say([MARKER])
            for number, cells in enumerate(seen.slices):
                if number:
                    say([MARKER])  # </image> before the first tile, then <col> or <row>
                if number == 1:
                    say([MARKER])
                for cell in cells:
                    say([i for word in cell for i in self.word(word)])
            say([MARKER])

        if not item.turns:
            if item.glimpse:
                look(item.glimpse)
            for piece in item.description:
                add(self.encode(piece.text), piece.learnt)
            add([self.end], True)
            return row
        for index, turn in enumerate(item.turns):
            add(self.header["user"])
            if index == 0 and item.glimpse:
                look(item.glimpse)
                say([MARKER])
            elif index == 0:
                add(self.encode(item.description[0].text))
            add(self.encode(turn.question), True)  # a question names what the description holds: practice in looking up
            if index == 0 and item.glimpse:
                say([MARKER])
            add([self.eot, *self.header["assistant"]])
            add([*self.encode(turn.answer), self.eot], True)
        return row

    def rows(self, step: int, count: int) -> tuple[list[Passage], list[Row]]:
        rng = Random(f"{self.args.seed}-{step}")
        passages = [passage(rng) for _ in range(count)]
        return passages, [self.row(item) for item in passages]

    def batch(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels [B, L], padded at the end."""
        length = max(len(row.ids) for row in rows)
        ids = np.full((len(rows), length), self.end, dtype=np.int64)
        labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = row.ids
            labels[index, : len(row.ids)] = np.where(row.learnt, row.ids, IGNORE)
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def embed(self, ids: torch.Tensor, rows: list[Row], step: int) -> torch.Tensor:
        """[B, L, D]: the embeddings of the ids, and what glimpses say instead where there are any."""
        table = self.model.model.embed_tokens.weight
        spoken = [(index, at, words) for index, row in enumerate(rows) for at, words in row.words.items()]
        embedded = torch.nn.functional.embedding(ids, table)
        if not spoken:
            return embedded
        rng = np.random.default_rng([self.args.seed, step])
        mixed = np.zeros((len(spoken), len(table)), np.float32)
        loud, dirt = rng.uniform(0.5, 1.5, len(rows)), rng.uniform(0, 0.8, len(rows))
        noise = rng.normal(size=(len(spoken), table.shape[1]))
        for which, (index, _, words) in enumerate(spoken):
            if words == [MARKER]:
                noise[which] *= 0.02
                continue
            for word in words:
                mixed[which, word] += loud[index] * rng.uniform(0.5, 1.5)
            noise[which] *= dirt[index] * loud[index] * SPREAD
        said = torch.from_numpy(mixed) @ table + torch.from_numpy(noise.astype(np.float32))
        where = torch.tensor([(index, at) for index, at, _ in spoken]).T
        return embedded.index_put((where[0], where[1]), said)

    def loss(self) -> torch.Tensor:
        """Next-token loss over what is learnt."""
        _, rows = self.rows(self.step, self.args.batch_size)
        ids, labels = self.batch(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bfloat16):
            # causal and right-padded: no mask needed
            return self.model(inputs_embeds=self.embed(ids, rows, self.step), labels=labels).loss

    @torch.no_grad()
    def evaluate(self, count: int = 96) -> dict[str, float]:
        """Share of answers to questions about unseen glimpses that are right in every token, a kind."""
        passages, rows = self.rows(10_000_000, count)
        right: dict[str, list[bool]] = {}
        for start in range(0, count, 32):
            part = rows[start : start + 32]
            ids, _ = self.batch(part)
            best = self.model(inputs_embeds=self.embed(ids, part, 10_000_000 + start)).logits.argmax(-1)
            for index, row in enumerate(part):
                item = passages[start + index]
                ends = [at for at, token in enumerate(row.ids) if token == self.eot][1::2]
                for turn, end in zip(item.turns if item.glimpse else (), ends, strict=False):
                    first = end - len(self.encode(turn.answer))
                    right.setdefault(turn.kind, []).append(
                        best[index, first - 1 : end].tolist() == row.ids[first : end + 1]
                    )
        return {kind: round(float(np.mean(found)), 2) for kind, found in sorted(right.items())}

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
    Trainer(bases.arguments(__doc__, "weights/tiny/llama", 9000, 2e-3, batch_size=(16, "passages a step"))).run()


if __name__ == "__main__":
    main()

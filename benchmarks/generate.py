"""Answering on this machine: decode rate beside mlx-lm's, time to first token of turns 1 and 2, batches, shares.

    python benchmarks/generate.py [--size smoke|small|1b] [--tokens N] [--rounds N] [--output FILE]

Random weights, full precision and 4-bit. mlx-lm's `stream_generate` runs the very same decoder object on as many
prompt tokens as the picture and the question take here; the two take turns and medians are compared. Decode rates
count the tokens behind the first. The picture has 7 slices. Stop ids and the loop guard are off, so that every
answer has the same length. Claims: decoding at 0.97 or more of mlx-lm's rate; the first token of turn 2 after at
most 10% of turn 1's time.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import mlx_llama3v  # noqa: F401  (loads the BLAS before mlx.core)
from mlx_llama3v.config import ImageConfig, ModelConfig, ProjectorConfig, TilingConfig, VisionConfig, llama_config
from mlx_llama3v.inference import Answer, Request, Sampling, Session, batch_generate
from mlx_llama3v.platform import machine, peak_memory
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.weights import TINY

# Vision tower, then width, inner width, layers, heads, key/value heads and vocabulary of the decoder. "small" has
# so400m's geometry: 81 visual tokens a slice.
SIZES = {
    "smoke": (VisionConfig(64, 128, 2, 2, image_size=64, patch_size=16), (128, 256, 2, 4, 2, 2048)),
    "small": (VisionConfig(384, 1536, 6, 6, image_size=384, patch_size=14), (768, 2048, 8, 12, 4, 32000)),
    "1b": (VisionConfig(), (2048, 8192, 16, 32, 8, 128256)),
}
QUESTION, NEXT = "What does the sign say, and what is beside it?", "And what color is it?"


def build(size: str, bits: int | None) -> Session:
    """A session on random weights that never ends an answer by itself."""
    import mlx.core as mx

    from mlx_llama3v.model import Llama3V, quantize_decoder
    from mlx_llama3v.platform import default_dtype
    from mlx_llama3v.vision.encode import Encoder
    from mlx_llama3v.vision.siglip import VisionTower

    vision, (width, inner, layers, heads, kv_heads, vocabulary) = SIZES[size]
    tokens = Tokens.load(TINY / "llama")
    text = llama_config({
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": max(vocabulary, tokens.size), "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    })  # fmt: skip
    projector = ProjectorConfig("attention", vision.hidden_size, width, vision.hidden_size, vision.num_attention_heads)
    mx.random.seed(0)
    model, tower = Llama3V(ModelConfig(vision, text, projector)), VisionTower(vision)
    model.language_model.set_dtype(default_dtype())
    tower.set_dtype(default_dtype())
    if bits:
        quantize_decoder(model, bits=bits)
    model.eval()
    mx.eval(model.parameters(), tower.parameters())
    tokens.stop = frozenset()
    return Session(model, tokens, Encoder(tower, vision, ImageConfig(), TilingConfig()))


def picture(session: Session, seed: int = 0) -> bytes:
    """A PNG that is split into 6 slices beside the overview."""
    from PIL import Image

    side = session.encoder.vision.image_size
    pixels = np.random.default_rng(seed).integers(0, 255, (2 * side, 3 * side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def ask(session: Session, text: str, images: list[bytes], tokens: int) -> Answer:
    *_, last = session.ask(text, images, Sampling(max_tokens=tokens, loop_guard=0))
    assert last.answer is not None and len(last.answer.tokens) == tokens
    return last.answer


def decode_rate(answer: Answer) -> float:
    return (len(answer.tokens) - 1) / answer.timings.decode


def mlx_lm_rate(session: Session, prompt: int, tokens: int) -> Callable[[], float]:
    """Tokens a second of mlx-lm's own loop on the same decoder, behind a prompt of as many tokens."""
    from mlx_lm import stream_generate
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    wrapped = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_file=str(TINY / "llama" / "tokenizer.json")))
    wrapped.eos_token_ids = set()
    ids = np.random.default_rng(0).integers(0, 200, prompt).tolist()

    def run() -> float:
        times = []
        for _ in stream_generate(session.model.language_model, wrapped, ids, max_tokens=tokens):
            times.append(time.perf_counter())
        return (tokens - 1) / (times[tokens - 1] - times[0])

    return run


def measure(size: str, bits: int | None, tokens: int, rounds: int) -> dict[str, Any]:
    session = build(size, bits)
    content = picture(session)
    first = ask(session, QUESTION, [content], tokens)  # warms up, and says how long the prompt is
    assert first.slices == 7
    theirs = mlx_lm_rate(session, first.prompt_tokens, tokens)
    theirs()
    found: dict[str, list[float]] = {
        name: [] for name in ("ours", "mlx_lm", "turn1", "turn2", "encode", "prefill", "decode")
    }
    for _ in range(rounds):
        session.reset()
        session._known.clear()  # the picture is encoded again
        one = ask(session, QUESTION, [content], tokens)
        two = ask(session, NEXT, [], tokens)
        found["ours"].append(decode_rate(one))
        found["mlx_lm"].append(theirs())
        found["turn1"].append(one.timings.first_token)
        found["turn2"].append(two.timings.first_token)
        for stage in ("encode", "prefill", "decode"):
            found[stage].append(getattr(one.timings, stage))
    medians = {name: statistics.median(values) for name, values in found.items()}
    whole = medians["encode"] + medians["prefill"] + medians["decode"]
    return {
        "bits": bits or "full", "prompt_tokens": first.prompt_tokens, "answer_tokens": tokens,
        "decode_tokens_per_s": medians["ours"], "mlx_lm_tokens_per_s": medians["mlx_lm"],
        "decode_ratio": statistics.median([a / b for a, b in zip(found["ours"], found["mlx_lm"], strict=True)]),
        "first_token_turn_1_s": medians["turn1"], "first_token_turn_2_s": medians["turn2"],
        "turn_2_share": medians["turn2"] / medians["turn1"],
        "shares": {stage: medians[stage] / whole for stage in ("encode", "prefill", "decode")},
        **batch(session, tokens, max(1, rounds // 2)),
    }  # fmt: skip


def batch(session: Session, tokens: int, rounds: int) -> dict[str, float]:
    """Eight questions about eight pictures, side by side and one after the other, pictures encoded before."""
    pictures = [session.encode(picture(session, seed)) for seed in range(8)]
    requests = [Request((Message("user", f"{n}: {QUESTION}", (0,)),), (p,)) for n, p in enumerate(pictures)]
    sampling = Sampling(max_tokens=tokens, loop_guard=0)
    together, alone = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        batch_generate(session.model, session.tokens, requests, sampling=sampling, batch_size=8)
        together.append(time.perf_counter() - started)
        started = time.perf_counter()
        for request in requests:
            batch_generate(session.model, session.tokens, [request], sampling=sampling, batch_size=1)
        alone.append(time.perf_counter() - started)
    seconds, single = statistics.median(together), statistics.median(alone)
    return {"batch_of_8_s": seconds, "one_by_one_s": single, "batch_speedup": single / seconds}


def show(row: dict[str, Any]) -> None:
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in row["shares"].items())
    print(f"\n{row['bits']} bits, {row['prompt_tokens']} prompt tokens, {row['answer_tokens']} answer tokens")
    ours, theirs, ratio = row["decode_tokens_per_s"], row["mlx_lm_tokens_per_s"], row["decode_ratio"]
    print(f"  decode      {ours:8.1f} tokens/s, mlx-lm {theirs:.1f}: {ratio:.3f} of it (claim: 0.97)")
    one, two = row["first_token_turn_1_s"], row["first_token_turn_2_s"]
    print(f"  first token {one:8.3f} s in turn 1, {two:.3f} s in turn 2: {row['turn_2_share']:.1%} (claim: 10%)")
    print(f"  8 questions {row['batch_of_8_s']:8.2f} s together, {row['one_by_one_s']:.2f} s one by one: "
          f"{row['batch_speedup']:.2f} times as fast")  # fmt: skip
    print(f"  turn 1      {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, nargs="*", default=[0, 4], help="0: full precision")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    for bits in args.bits:
        rows.append(measure(args.size, bits or None, args.tokens, args.rounds))
        show(rows[-1])
    print(f"\npeak memory {peak_memory() / 1e9:.2f} GB")
    if args.output:
        args.output.write_text(json.dumps({"machine": about, "size": args.size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

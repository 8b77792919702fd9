"""A LoRA step on the decoder: ours from the store, ours encoding each step, full logits, mlx-vlm, transformers.

    python benchmarks/train_step.py [--tower small|so400m] [--peers a,b] [--rounds N] [--output FILE]

The same random weights (Llama with `--hidden` 512, 8 layers, vocabulary 128256; LLaVA-1.5's two-layer projector; a
SigLIP tower at 224 px) and the same rows (the tower's patches and 64 text tokens, half of them answers, batch 4),
LoRA of rank 16 on all linear layers, AdamW. float32 on a CPU; on a GPU frozen weights are bfloat16. Each peer runs in
a process of its own; the median of `--rounds` steps after one that warms up is taken. Memory is what MLX reports at
its peak (for PyTorch: what it allocated on the GPU; on a CPU what the process held at its peak beyond what it held
when everything was imported), and the same without the weights.

mlx-vlm's own LLaVA model, loss and step (`mlx_vlm.trainer`) are taken. It cannot run this batch: it hands the padding
mask [B, L] to the attention, which fails for more than one row, and is not causal for one. So there are two: "mlx-vlm"
is the batch of 4 without that mask, "mlx-vlm 4x1" its unchanged path, four rows accumulated. Pictures of a batch it
mixes up (each row gets the last one's), so losses are not equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_llama3v.config import (
    Encoded,
    ImageConfig,
    ModelConfig,
    ProjectorConfig,
    SliceLayout,
    TilingConfig,
    VisionConfig,
    llama_config,
)

TOWERS = {
    "small": VisionConfig(384, 1536, 6, 6, image_size=224, patch_size=16),
    "so400m": VisionConfig(1152, 4304, 27, 16, image_size=224, patch_size=14),
}
PEERS = ("ours", "ours encoding", "full logits", "mlx-vlm", "mlx-vlm 4x1", "transformers")
BATCH, TEXT, ANSWER, VOCAB, IMAGE_ID, RANK, SCALE = 4, 64, 32, 128256, 128010, 16, 2.0
Step = Callable[[], float]  # one training step; its loss
LANES = ExitStack()  # for the life of a process: a context that nobody holds would end, and its threads with it


def llama(hidden: int, layers: int) -> dict[str, Any]:
    """The decoder's configuration."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


def rows(tower: VisionConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and supervised [4, visual + text], pixels [4, side, side, 3]: a start, the picture, text."""
    random = np.random.default_rng(0)
    visual = tower.grid**2
    text = random.integers(0, 128000, (BATCH, TEXT))
    ids = np.concatenate([text[:, :4], np.full((BATCH, visual), IMAGE_ID), text[:, 4:]], 1).astype(np.int32)
    supervised = np.zeros(ids.shape, bool)
    supervised[:, -ANSWER:] = True
    return ids, supervised, random.standard_normal((BATCH, tower.image_size, tower.image_size, 3)).astype(np.float32)


def make_weights(tower: VisionConfig, hidden: int, layers: int, path: Path) -> None:
    """Random weights of tower, projector and decoder, by Hugging Face's names."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM, SiglipVisionModel

    torch.manual_seed(0)
    parts = {"llm": LlamaForCausalLM(hf_llama(hidden, layers)), "vision": SiglipVisionModel(hf_siglip(tower))}
    weights = {f"{part}.{name}": value for part, model in parts.items() for name, value in model.state_dict().items()}
    for name, width in (("linear_1", tower.hidden_size), ("linear_2", hidden)):
        weights[f"projector.{name}.weight"] = torch.randn(hidden, width) * width**-0.5
        weights[f"projector.{name}.bias"] = torch.zeros(hidden)
    save_file({name: value.contiguous() for name, value in weights.items()}, str(path))


def hf_llama(hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig

    values = {key: value for key, value in llama(hidden, layers).items() if key not in ("model_type", "rope_theta")}
    return LlamaConfig(**values, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def hf_siglip(tower: VisionConfig) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_hidden_layers=tower.num_hidden_layers,
        num_attention_heads=tower.num_attention_heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
    )


def part(weights: dict[str, Any], name: str) -> dict[str, Any]:
    """Those of one part, without its prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def ours(args: argparse.Namespace, work: Path, how: str) -> tuple[Step, float]:
    """The product's own model, step and lanes; `how` is the peer's name. A step, and the bytes of the weights."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_llama3v.data.batches import Batch, collate
    from mlx_llama3v.data.rows import Row
    from mlx_llama3v.embeddings.store import Store
    from mlx_llama3v.embeddings.writer import StoreWriter
    from mlx_llama3v.lanes import lanes
    from mlx_llama3v.model import Llama3V
    from mlx_llama3v.platform import default_dtype
    from mlx_llama3v.tensors import parameters
    from mlx_llama3v.text.prompt import FIRST_VISUAL, Rendered
    from mlx_llama3v.train.config import TrainConfig
    from mlx_llama3v.train.lora import prepare
    from mlx_llama3v.train.optim import adamw
    from mlx_llama3v.train.step import Step as TrainStep
    from mlx_llama3v.train.step import add
    from mlx_llama3v.vision.encode import Encoder, patchify
    from mlx_llama3v.vision.siglip import VisionTower, tower_weights

    tower = TOWERS[args.tower]
    weights: Any = mx.load(str(work / "weights.safetensors"))
    projector = ProjectorConfig("mlp", tower.hidden_size, args.hidden)
    model = Llama3V(ModelConfig(tower, llama_config(llama(args.hidden, args.layers)), projector))
    model.language_model.load_weights(list(part(weights, "llm").items()))
    model.language_model.set_dtype(default_dtype())
    model.projector.body.load_weights(list(part(weights, "projector").items()))
    as_they_are = ImageConfig(rescale_factor=1.0, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    encoder = None
    if how == "ours encoding" or not (work / "store").exists():
        body = VisionTower(tower)
        body.load_weights(list(tower_weights(part(weights, "vision")).items()), strict=True)
        body.set_dtype(default_dtype())
        encoder = Encoder(body, tower, as_they_are, TilingConfig("squash"))
    ids, supervised, pixels = rows(tower)
    layout = SliceLayout((tower.grid, tower.grid))

    def encode() -> list[np.ndarray]:
        assert encoder is not None
        return encoder.encode([((tower.grid, tower.grid), patchify(one, tower.patch_size)) for one in pixels], BATCH)

    if not (work / "store").exists():
        with StoreWriter(work / "store", {}, "float16") as writer:
            for n, values in enumerate(encode()):
                writer.add(f"{n}", f"{n:064x}", Encoded(layout, values))
    if how != "ours encoding":
        encoder = None
    store = Store(work / "store")
    source = np.where(ids == IMAGE_ID, FIRST_VISUAL + np.cumsum(ids == IMAGE_ID, 1) - 1, 0).astype(np.int32)
    laid_out = [Row(str(n), Rendered(ids[n], source[n], supervised[n]), (str(n),), (layout,)) for n in range(BATCH)]
    config = TrainConfig(stage="sft", batch_size=BATCH, lora_rank=RANK, lora_scale=SCALE).resolved()
    prepare(model, config)
    optimizer = adamw(0.0)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters())
    size = sum(value.nbytes for value in parameters(model).values())
    if encoder is not None:
        size += sum(value.nbytes for value in parameters(encoder.tower).values())
    step = TrainStep(model, optimizer, 1.0, bool(config.compile))
    mx.eval(model.state, optimizer.state)  # lanes take no work of another thread over

    def full(batch: Batch) -> Any:
        def loss(model: Llama3V) -> mx.array:
            inputs = batch.ids, batch.source, batch.patches, batch.grid, batch.num_tokens
            logits = model(batch.ids, input_embeddings=model.embed(*inputs)).astype(mx.float32)
            return (nn.losses.cross_entropy(logits, batch.targets) * batch.supervised).sum()

        learned = model.trainable_parameters()
        value, gradients = nn.value_and_grad(model, loss)(model)
        model.update(learned)  # the transformation left its own placeholders there
        return value, batch.supervised.sum(), gradients

    def run() -> float:
        found = encode() if encoder is not None else None
        total: Any = None
        running = []
        for lane in range(config.lanes):
            batch = collate(laid_out[lane :: config.lanes], store, model.config, 4)
            if found is not None:
                batch = replace(batch, stored={"patches": mx.array(np.stack(found[lane :: config.lanes]))})
            make = partial(full, batch) if how == "full logits" else partial(step.gradients, batch)
            running.append(side.start(make))
        for one in running:
            total = one.result() if total is None else add(total, one.result())
        loss, count, gradients = total
        norm = step.norm(gradients, count)
        mx.eval(loss, count, gradients, norm)
        step.update(gradients, count, norm, 1e-4)
        mx.eval(model.state, optimizer.state)
        return float(loss) / float(count)

    side = LANES.enter_context(lanes(config.lanes))
    return run, size


def mlx_vlm(args: argparse.Namespace, work: Path, parts: int = 1) -> tuple[Step, float]:
    """mlx-vlm's LLaVA with a SigLIP tower, its loss and its step, LoRA on the decoder; the batch in `parts`."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_vlm.models.llava import Model
    from mlx_vlm.models.llava import config as llava
    from mlx_vlm.trainer.common.utils import apply_gradient_step
    from mlx_vlm.trainer.vlm.sft.runtime import vlm_sft_loss

    from mlx_llama3v.platform import default_dtype

    tower = TOWERS[args.tower]
    weights: Any = mx.load(str(work / "weights.safetensors"))
    vision = llava.VisionConfig(
        model_type="siglip_vision_model",
        num_hidden_layers=tower.num_hidden_layers,
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_attention_heads=tower.num_attention_heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        layer_norm_eps=1e-6,
    )
    config = llava.ModelConfig(
        llava.TextConfig.from_dict(llama(args.hidden, args.layers)),
        vision,
        "llava",
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vocab_size=VOCAB,
    )

    class Unmasked(Model):
        """Without the padding mask; nothing is padded here."""

        def __call__(self, input_ids: Any, pixel_values: Any, mask: Any, cache: Any = None, **more: Any) -> Any:
            return super().__call__(input_ids, pixel_values, None, cache, **more)

    model = Model(config) if parts > 1 else Unmasked(config)
    loaded = {f"language_model.{name}": value for name, value in part(weights, "llm").items()}
    loaded |= {f"multi_modal_projector.{name}": value for name, value in part(weights, "projector").items()}
    names = {
        f"vision_tower.vision_model.{name.removeprefix('vision_model.')}": v
        for name, v in part(weights, "vision").items()
    }
    loaded |= model.vision_tower.sanitize(names)
    model.load_weights(list(loaded.items()), strict=False)
    model.set_dtype(default_dtype())
    model.freeze()
    keys = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    linear_to_lora_layers(model.language_model, args.layers, keys)
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    optimizer = optim.AdamW(learning_rate=1e-4)
    optimizer.init(model.trainable_parameters())
    ids, supervised, pixels = rows(tower)
    batch = {
        "input_ids": mx.array(ids),
        "attention_mask": mx.ones(ids.shape, mx.int32),
        "completion_mask": mx.array(supervised.astype(np.int32)),
        "pixel_values": mx.array(pixels.transpose(0, 3, 1, 2)).astype(default_dtype()),
    }
    batches = [{name: value[n::parts] for name, value in batch.items()} for n in range(parts)]
    gradient = nn.value_and_grad(model, lambda model, batch: vlm_sft_loss(model, batch, train_on_completions=True))
    mx.eval(model.parameters(), batches)
    model.train()

    def run() -> float:
        gradients, total = None, 0.0
        for number, one in enumerate(batches, 1):
            loss, _, gradients = apply_gradient_step(
                model, optimizer, gradient, one, gradients, update=number == parts, accumulation_steps=parts
            )
            mx.eval(model.state, optimizer.state, loss, gradients)
            total += float(loss) / parts
        return total

    return run, size


def transformers(args: argparse.Namespace, work: Path) -> tuple[Step, float]:
    """SiglipVisionModel, LlamaForCausalLM and peft's LoRA, as a LLaVA step does it: tower each time, all logits."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM, SiglipVisionModel

    gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    tower_config = TOWERS[args.tower]
    weights = {name: value.to(dtype) for name, value in load_file(work / "weights.safetensors").items()}
    decoder = LlamaForCausalLM(hf_llama(args.hidden, args.layers)).to(dtype)
    decoder.load_state_dict(part(weights, "llm"))
    tower = SiglipVisionModel(hf_siglip(tower_config)).to(dtype).eval()
    tower.load_state_dict(part(weights, "vision"))
    tower.to(device)
    projector = {name: value.to(device) for name, value in part(weights, "projector").items()}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=targets)
    model = get_peft_model(decoder, lora).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    size = sum(value.numel() * value.element_size() for value in weights.values())
    ids_, supervised, pixels_ = rows(tower_config)
    ids = torch.from_numpy(ids_).long()
    labels = torch.where(torch.from_numpy(supervised), ids, -100).to(device)
    ids, pixels = ids.to(device), torch.from_numpy(pixels_.transpose(0, 3, 1, 2).copy()).to(device, dtype)
    functional = torch.nn.functional

    def run() -> float:
        with torch.no_grad():
            seen = tower(pixels, output_hidden_states=True).hidden_states[-1]
            seen = functional.gelu(functional.linear(seen, projector["linear_1.weight"], projector["linear_1.bias"]))
            seen = functional.linear(seen, projector["linear_2.weight"], projector["linear_2.bias"])
            vectors = decoder.get_input_embeddings()(ids)
            vectors[ids == IMAGE_ID] = seen.reshape(-1, seen.shape[-1])
        loss = model(inputs_embeds=vectors, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run, size


def held() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def child(args: argparse.Namespace, work: Path) -> None:
    """Run one peer, and print what it took."""
    peers: dict[str, Any] = {
        "mlx-vlm": mlx_vlm,
        "mlx-vlm 4x1": lambda args, work: mlx_vlm(args, work, BATCH),
        "transformers": transformers,
    }
    if args.child == "transformers":
        import peft  # noqa: F401
        import torch
    else:
        import mlx.core as mx

        from mlx_llama3v.platform import load_blas

        load_blas()
    before = held()
    run, size = peers[args.child](args, work) if args.child in peers else ours(args, work, args.child)
    losses, times = [run()], []
    if args.child != "transformers":
        mx.reset_peak_memory()
    elif torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.rounds):
        start = time.perf_counter()
        losses.append(run())
        times.append(time.perf_counter() - start)
    if args.child == "transformers":
        from mlx_llama3v.platform import peak_memory

        gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if gpu else peak_memory() - before
        threads = torch.get_num_threads()
    else:
        threads, peak = 0, mx.get_peak_memory()
    report = {"seconds": statistics.median(times), "peak": peak, "weights": size, "losses": losses, "threads": threads}
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    os._exit(0)  # lanes are threads that nobody ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=TOWERS, default="small")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "weights":
        make_weights(TOWERS[args.tower], args.hidden, args.layers, args.work / "weights.safetensors")
        return
    if args.child:
        child(args, args.work)
        return
    from mlx_llama3v.platform import machine

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        passed = ["--tower", args.tower, "--hidden", str(args.hidden), "--layers", str(args.layers)]
        command = [sys.executable, __file__, *passed, "--rounds", str(args.rounds), "--work", work, "--child"]
        subprocess.run([*command, "weights"], check=True, stderr=subprocess.DEVNULL)
        for peer in args.peers.split(","):
            done = subprocess.run([*command, peer], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{peer}: {done.stderr[-2000:]}")
            results[peer] = json.loads(done.stdout.strip().splitlines()[-1])
            show(peer, results)
    report = {"tower": args.tower, "hidden": args.hidden, "layers": args.layers, "results": results, **machine()}
    print(json.dumps(machine()))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def show(peer: str, results: dict[str, Any]) -> None:
    """One line a peer; ratios are to mlx-vlm where it has run, else to ours."""
    found = results[peer]
    above = found["peak"] - found["weights"]
    base = results.get("ours", found)
    print(
        f"{peer:14} {1000 * found['seconds']:8.1f} ms a step ({found['seconds'] / base['seconds']:4.2f}x ours), "
        f"peak {found['peak'] / 1e9:5.2f} GB, above the weights {above / 1e9:5.2f} GB "
        f"(ours {(base['peak'] - base['weights']) / max(1, above):4.2f}x of it), loss {found['losses'][0]:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

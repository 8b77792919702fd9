"""Memory and time of a conversion: a synthetic LLaVA checkpoint through `convert --hf-path`, each in its own process.

Claim: the peak, beside what the imports take, is no more than 1.5 times the largest shard of the source plus the output
buffer, whatever the size of the model.

    python benchmarks/convert.py [--gigabytes 4 --shard 1 --buffer 1] [--bits 4] [--rounds 3] [--output convert.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mlx_llama3v.platform import machine


def synthetic(directory: Path, gigabytes: float, shard: float) -> float:
    """Write a bf16-sized (float16) LLaVA with a wide decoder; returns the bytes of its largest shard."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from safetensors.numpy import save_file

    from tests.hf_llava import make_llava

    make_llava(directory, tie=False)
    config = json.loads((directory / "config.json").read_text())
    text = config["text_config"]
    width, inner = 2048, 8192
    per_layer = 2 * (2 * width * width + 2 * width * width // 4 + 3 * width * inner)
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    kv = width // 4
    text |= {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 4, "head_dim": 128}
    (directory / "config.json").write_text(json.dumps(config))
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "np") as file:
        names = [name for name in file.keys() if name.startswith("vision_tower")]  # noqa: SIM118
        kept = {name: file.get_tensor(name) for name in names}
    (directory / "model.safetensors").unlink()
    vocabulary = text["vocab_size"]
    shapes = {"language_model.model.norm.weight": (width,)}
    shapes |= {f"language_model.{name}.weight": (vocabulary, width) for name in ("model.embed_tokens", "lm_head")}
    shapes |= {"multi_modal_projector.linear_1.weight": (width, 32), "multi_modal_projector.linear_1.bias": (width,)}
    shapes |= {"multi_modal_projector.linear_2.weight": (width, width), "multi_modal_projector.linear_2.bias": (width,)}
    block = {f"self_attn.{n}_proj": (width if n in "qo" else kv, width) for n in "qkvo"}
    block |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes |= {f"language_model.model.layers.{i}.{n}.weight": s for i in range(layers) for n, s in block.items()}
    random = np.random.default_rng(0)
    pending, files, index, largest = dict(kept), 0, {}, 0.0

    def close() -> None:
        nonlocal files, pending, largest
        name = f"model-{files:05d}.safetensors"
        save_file(pending, directory / name)
        index.update(dict.fromkeys(pending, name))
        largest = max(largest, sum(value.nbytes for value in pending.values()))
        files, pending = files + 1, {}

    for name, shape in shapes.items():
        pending[name] = (random.random(shape, np.float32) - 0.5).astype(np.float16)
        if sum(value.nbytes for value in pending.values()) >= shard * 1e9:
            close()
    close()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return largest


_CHILD = """
import json, sys, time
from mlx_llama3v.platform import peak_memory
from mlx_llama3v.weights.quantize import QuantConfig
from mlx_llama3v.weights.vlm import convert_vlm
source, target, buffer, bits = sys.argv[1:]
before, started = peak_memory(), time.perf_counter()
quantize = QuantConfig(int(bits)) if bits != "0" else None
convert_vlm(source, target, shard_bytes=int(float(buffer) * 1e9), quantize=quantize)
print(json.dumps([before, peak_memory(), time.perf_counter() - started]))
"""


def measure(folder: Path, buffer: float, bits: int) -> tuple[int, int, float]:
    """One conversion in a process of its own: peak bytes after the imports and at the end, seconds."""
    target = folder / "model"
    command = [sys.executable, "-c", _CHILD, str(folder / "hf"), str(target), str(buffer), str(bits)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(target)
    before, peak, seconds = json.loads(out.splitlines()[-1])
    return before, peak, seconds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the source")
    parser.add_argument("--shard", type=float, default=1.0, help="GB of a source file")
    parser.add_argument("--buffer", type=float, default=1.0, help="GB of an output file")
    parser.add_argument("--bits", type=int, default=0, help="quantize to so many bits; 0: not at all")
    parser.add_argument("--rounds", type=int, default=3, help="conversions; medians are shown")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        largest = synthetic(Path(folder) / "hf", args.gigabytes, args.shard)
        size = sum(path.stat().st_size for path in (Path(folder) / "hf").glob("*.safetensors"))
        runs = [measure(Path(folder), args.buffer, args.bits) for _ in range(args.rounds)]
    imports, peak, seconds = (statistics.median(values) for values in zip(*runs, strict=True))
    limit = 1.5 * largest + args.buffer * 1e9
    found = {
        "machine": machine(),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "source_gb": size / 1e9,
        "largest_shard_gb": largest / 1e9,
        "imports_gb": imports / 1e9,
        "peak_gb": peak / 1e9,
        "conversion_gb": (peak - imports) / 1e9,
        "limit_gb": limit / 1e9,
        "share_of_limit": (peak - imports) / limit,
        "within": all(most - start <= limit for start, most, _ in runs),
        "seconds": seconds,
        "seconds_of_each": [run[2] for run in runs],
    }
    print(json.dumps(found, indent=2))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The same training step by mlx-vlm and by transformers with peft, for train_step.py."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from step_work import IMAGE_ID, RANK, SCALE, TOWERS, VOCAB, Step, hf_llama, hf_siglip, llama, part, rows


def llava_model(args: argparse.Namespace, work: Path, unmasked: bool) -> Any:
    """mlx-vlm's LLaVA with a SigLIP tower and our weights, frozen; `unmasked`: without the padding mask."""
    import mlx.core as mx
    from mlx_vlm.models.llava import Model
    from mlx_vlm.models.llava import config as llava

    from mlx_llama3v.platform import default_dtype

    class Unmasked(Model):
        """Without the padding mask; nothing is padded here."""

        def __call__(self, input_ids: Any, pixel_values: Any, mask: Any, cache: Any = None, **more: Any) -> Any:
            return super().__call__(input_ids, pixel_values, None, cache, **more)

    tower = asdict(TOWERS[args.tower])
    known = {name: value for name, value in tower.items() if name in llava.VisionConfig.__dataclass_fields__}
    config = llava.ModelConfig(
        llava.TextConfig.from_dict(llama(args.hidden, args.layers)),
        llava.VisionConfig(**{**known, "model_type": "siglip_vision_model"}),
        "llava",
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vocab_size=VOCAB,
    )
    model = (Unmasked if unmasked else Model)(config)
    weights: Any = mx.load(str(work / "weights.safetensors"))
    loaded = {f"language_model.{name}": value for name, value in part(weights, "llm").items()}
    loaded |= {f"multi_modal_projector.{name}": value for name, value in part(weights, "projector").items()}
    vision = {
        f"vision_tower.vision_model.{n.removeprefix('vision_model.')}": v for n, v in part(weights, "vision").items()
    }
    loaded |= model.vision_tower.sanitize(vision)
    model.load_weights(list(loaded.items()), strict=False)
    model.set_dtype(default_dtype())
    model.freeze()
    return model


def mlx_vlm(args: argparse.Namespace, work: Path, parts: int = 1) -> tuple[Step, float]:
    """mlx-vlm's LLaVA with a SigLIP tower, its loss and its step, LoRA on the decoder; the batch in `parts`."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_vlm.trainer.common.utils import apply_gradient_step
    from mlx_vlm.trainer.vlm.sft.runtime import vlm_sft_loss

    from mlx_llama3v.platform import default_dtype

    model = llava_model(args, work, unmasked=parts == 1)
    keys = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    linear_to_lora_layers(model.language_model, args.layers, keys)
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    optimizer = optim.AdamW(learning_rate=1e-4)
    optimizer.init(model.trainable_parameters())
    ids, supervised, pixels = rows(TOWERS[args.tower])
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

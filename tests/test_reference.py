"""Loss and gradients of the whole model, against PyTorch and transformers with the same weights.

The reference is written anew from the definition: each picture's slices alone and unpadded through the projector,
each row alone through transformers' Llama, LoRA from peft, a cross entropy over all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llama3v.data.batches import collate
from mlx_llama3v.data.records import Record
from mlx_llama3v.data.rows import Row, RowLayout, build_rows
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.model import Llama3V
from mlx_llama3v.tensors import parameters
from mlx_llama3v.text.prompt import FIRST_VISUAL, Message
from mlx_llama3v.train.lora import prepare
from tests.hf_llama import LLAMA3_SCALING
from tests.test_loss import found
from tests.tiny_model import tiny_model, tiny_tokens
from tests.tiny_run import chats, make_store, settings

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


def rows_of(model: Llama3V, store: Store) -> list[Row]:
    """A split picture, several pictures in two turns, text alone, and plain ones."""
    ask, say = Message("user", "Both?", (0, 1)), Message("assistant", "yes, both of them")
    records = [
        *chats(5)[1:],
        Record("two", ("1.png", "3.png"), (ask, say)),
        Record("turns", ("0.png", "2.png"), (Message("user", "A?", (1,)), say, Message("user", "B?", (0,)), say)),
        Record("text", (), (Message("user", "Say it."), Message("assistant", "it"))),
    ]
    rows, problems = build_rows(records, RowLayout(store, tiny_tokens(), model.config.projector_config, "sft", 1000))
    assert not problems
    return [*rows]


def to_torch(value: mx.array) -> Any:
    return torch.from_numpy(np.array(value.astype(mx.float32)))


def hf_decoder(model: Llama3V) -> Any:
    """transformers' Llama with the model's weights, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args = model.language_model.args
    config = LlamaConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
        head_dim=args.head_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.rms_norm_eps,
        max_position_embeddings=args.max_position_embeddings,
        rope_parameters={"rope_theta": args.rope_theta, **LLAMA3_SCALING},
        tie_word_embeddings=args.tie_word_embeddings,
    )
    decoder = LlamaForCausalLM(config)
    weights = {
        name.replace(".linear.", "."): to_torch(value)
        for name, value in parameters(model.language_model).items()
        if "lora" not in name
    }
    decoder.load_state_dict(weights, strict=True)
    return decoder.requires_grad_(False)


def add_lora(decoder: Any, model: Llama3V, rank: int, scale: float) -> tuple[Any, dict[str, Any]]:
    """peft's LoRA with the model's matrices; the wrapped decoder, and its parameters by our names."""
    from peft import LoraConfig, get_peft_model

    names = {name: value for name, value in parameters(model.language_model).items() if ".lora_" in name}
    targets = sorted({name.split(".")[-2] for name in names})
    wrapped = get_peft_model(decoder, LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=targets))
    by_name = dict(wrapped.named_parameters())
    ours = {}
    for name, value in names.items():
        stem, _, which = name.rpartition(".")
        parameter = by_name[f"base_model.model.{stem}.lora_{which[-1].upper()}.default.weight"]
        parameter.data = to_torch(value).T.contiguous()
        ours[f"language_model.{name}"] = parameter
    return wrapped, ours


def positions(height: int, width: int, size: int) -> Any:
    """MAE's sin-cos table of a grid, [height * width, size]."""
    quarter = size // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
    row, col = np.divmod(np.arange(height * width), width)
    angles = [at[:, None] * frequencies for at in (row, col)]
    return torch.tensor(np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1), dtype=torch.float32)


def project(weights: dict[str, Any], patches: Any, grid: tuple[int, int], heads: int, pool: int) -> Any:
    """One slice through the attention projector: [h * w, D_v] -> [tokens, D]."""
    functional = torch.nn.functional

    def linear(name: str, x: Any) -> Any:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Any) -> Any:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    x = linear("body.linear_in", patches)
    x = x + positions(*grid, x.shape[-1])
    for n in range(2):
        block = f"body.blocks.{n}"
        y = norm(f"{block}.norm1", x)
        q, k, v = (
            linear(f"{block}.{part}_proj", y).view(len(x), heads, -1).transpose(0, 1) for part in ("q", "k", "v")
        )
        y = functional.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).reshape(len(x), -1)
        x = x + linear(f"{block}.out_proj", y)
        x = x + linear(f"{block}.fc2", functional.relu(linear(f"{block}.fc1", norm(f"{block}.norm2", x))) ** 2)
    x = x.view(*grid, -1)
    means = [
        x[r : r + pool, c : c + pool].reshape(-1, x.shape[-1]).mean(0)
        for r in range(0, grid[0], pool)
        for c in range(0, grid[1], pool)
    ]
    return linear("body.linear_out", norm("body.norm", torch.stack(means)))


def reference(model: Llama3V, decoder: Any, weights: dict[str, Any], rows: Sequence[Row], store: Store) -> Any:
    """Summed loss of the rows, one after the other."""
    config = model.config.projector_config
    base = decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder
    total = torch.zeros(())
    for row in rows:
        visual = []
        for name in row.images:
            layout, values = store.read(name)
            ends = np.cumsum([h * w for h, w in layout.grids])[:-1]
            for grid, patches in zip(layout.grids, np.split(values.astype(np.float32), ends), strict=True):
                visual.append(project(weights, torch.from_numpy(patches), grid, config.num_heads, config.pool))
        table = torch.cat([weights["markers"], *visual])
        ids = torch.from_numpy(row.rendered.ids).long()
        vectors = base.get_input_embeddings()(ids)
        source = torch.from_numpy(row.rendered.source).long()
        vectors = torch.where((source > 0)[:, None], table[(source - 1).clamp(min=0)], vectors)
        logits = decoder(inputs_embeds=vectors[None]).logits[0]
        learned = torch.from_numpy(row.rendered.supervised)[1:]
        total = total + torch.nn.functional.cross_entropy(logits[:-1][learned], ids[1:][learned], reduction="sum")
    assert 1 + len(weights["markers"]) == FIRST_VISUAL
    return total


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_loss_and_gradients_are_those_of_torch(stage: str, store: Store) -> None:
    model = tiny_model(scale=1.5)
    config = settings(stage, tune_projector=stage == "sft")
    prepare(model, config)
    for name, value in dict(tree_flatten(model.trainable_parameters())).items():
        if name.endswith("lora_b"):
            model.load_weights([(name, mx.random.normal(value.shape, scale=0.3))], strict=False)
    rows = rows_of(model, store)
    loss, count, gradients = found(model, collate(rows, store, model.config))

    weights = {name: to_torch(value).requires_grad_() for name, value in parameters(model.projector).items()}
    decoder, theirs = hf_decoder(model), {f"projector.{name}": value for name, value in weights.items()}
    if stage == "sft":
        decoder, adapters = add_lora(decoder, model, config.lora_rank, config.lora_scale)
        theirs |= adapters
    expected = reference(model, decoder, weights, rows, store)
    expected.backward()
    assert count == sum(int(row.rendered.supervised.sum()) for row in rows)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert gradients.keys() == theirs.keys()
    for name, value in gradients.items():
        wanted = theirs[name].grad.numpy()
        wanted = wanted.T if ".lora_" in name else wanted
        size = np.linalg.norm(wanted)
        if name.endswith("k_proj.bias"):  # zero: it adds the same to all scores of a query; both have rounding errors
            size = np.linalg.norm(gradients[name.replace(".bias", ".weight")])
            assert np.linalg.norm(wanted) < 1e-6 * size, name
        error = np.linalg.norm(value - wanted) / size
        assert error < 1e-5, (name, error)


def test_the_reference_notices_another_weight(store: Store) -> None:
    model = tiny_model(scale=1.5)
    prepare(model, settings("pretrain"))
    rows = rows_of(model, store)[:2]
    loss = found(model, collate(rows, store, model.config))[0]
    weights = {name: to_torch(value) for name, value in parameters(model.projector).items()}
    weights["body.linear_out.bias"][3] += 1.0
    assert float(reference(model, hf_decoder(model), weights, rows, store)) != pytest.approx(loss, rel=1e-5)

"""The merge and the decoder: rows, causality, gradients, compilation, quantization."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_llama3v.compat import linear_to_lora_layers
from mlx_llama3v.inference import embed_rows
from mlx_llama3v.model import Llama3V, quantize_decoder
from mlx_llama3v.text.prompt import FIRST_VISUAL, Message, Rendered, render
from tests.tiny_model import PLAIN, SPLIT, picture, tiny_model, tiny_tokens

TOKENS = tiny_tokens()
ROWS = [
    ("What is it?", [picture(SPLIT, 1)]),
    ("Are they the same?", [picture(PLAIN, 2), picture(SPLIT, 3)]),
    ("No picture.", []),
]


def row(model: Llama3V, text: str, pictures) -> Rendered:
    messages = [Message("user", text, tuple(range(len(pictures)))), Message("assistant", "It is.")]
    return render(messages, [p.layout for p in pictures], TOKENS, model.config.projector_config)


def logits(model: Llama3V, rows) -> list[np.ndarray]:
    """Logits of each row's own positions, from one batch."""
    rendered = [row(model, *r) for r in rows]
    ids, vectors = embed_rows(model, rendered, [pictures for _, pictures in rows])
    out = model(ids, input_embeddings=vectors)
    return [np.array(values[: len(r)]) for values, r in zip(out, rendered, strict=True)]


@pytest.fixture(scope="module")
def model() -> Llama3V:
    return tiny_model()


@pytest.mark.parametrize("kind", ["attention", "linear", "mlp"])
def test_rows_of_a_batch_do_not_see_each_other(kind: str) -> None:
    model = tiny_model(kind)
    together = logits(model, ROWS)
    for batched, alone in zip(together, ROWS, strict=True):
        np.testing.assert_allclose(batched, logits(model, [alone])[0], atol=5e-4)
    changed = [ROWS[0], (ROWS[1][0], [picture(PLAIN, 8), picture(SPLIT, 9)]), ROWS[2]]
    after = logits(model, changed)
    np.testing.assert_allclose(after[0], together[0], atol=5e-4)
    np.testing.assert_allclose(after[2], together[2], atol=5e-4)
    assert np.abs(after[1] - together[1]).max() > 0.1


def test_a_row_reads_its_own_pictures_in_their_order(model: Llama3V) -> None:
    text = ROWS[1][0]
    (before,) = logits(model, [(text, [picture(PLAIN, 2), picture(PLAIN, 3)])])
    (after,) = logits(model, [(text, [picture(PLAIN, 3), picture(PLAIN, 2)])])
    assert np.abs(before - after).max() > 0.1


def test_merge_takes_each_vector_from_its_source(model: Llama3V) -> None:
    rendered = row(model, *ROWS[0])
    ids, vectors = embed_rows(model, [rendered], [ROWS[0][1]])
    merged, text = np.array(vectors[0]), np.array(model.embed(ids)[0])
    for i, source in enumerate(rendered.source):
        if source == 0:
            np.testing.assert_array_equal(merged[i], text[i])
        elif source < FIRST_VISUAL:
            np.testing.assert_array_equal(merged[i], np.array(model.projector.markers[int(source) - 1]))
        else:
            assert np.abs(merged[i] - text[i]).max() > 1e-3
    np.testing.assert_array_equal(np.array(model.embed(ids, mx.zeros(ids.shape, mx.int32))[0]), text)


def test_a_later_token_never_changes_an_earlier_logit(model: Llama3V) -> None:
    rendered = [row(model, *r) for r in ROWS]
    ids, vectors = embed_rows(model, rendered, [pictures for _, pictures in ROWS])
    before = np.array(model(ids, input_embeddings=vectors))
    first = int(np.flatnonzero(rendered[0].source >= FIRST_VISUAL)[-1])  # a visual token of row 0
    for position in (first, ids.shape[1] // 2, ids.shape[1] - 1):
        changed = np.array(vectors)
        changed[:, position] += 1.0
        after = np.array(model(ids, input_embeddings=mx.array(changed)))
        np.testing.assert_allclose(after[:, :position], before[:, :position], atol=1e-4)
        assert (np.abs(after[:, position] - before[:, position]).max(axis=-1) > 1e-2).all()


def loss_of(model: Llama3V, kind_of_rows=ROWS):
    """A next-token loss as a function of the projector's parameters."""
    rendered = [row(model, *r) for r in kind_of_rows]
    length = max(map(len, rendered))
    targets = mx.array(np.stack([np.pad(r.ids[1:], (0, length - len(r))) for r in rendered]))
    wanted = mx.array(np.stack([np.pad(r.supervised[1:], (0, length - len(r))) for r in rendered]))

    def loss(parameters, targets, wanted):
        model.projector.update(parameters)
        ids, vectors = embed_rows(model, rendered, [pictures for _, pictures in kind_of_rows])
        out = model(ids, input_embeddings=vectors)[:, :-1]
        nll = mx.logsumexp(out, axis=-1) - mx.take_along_axis(out, targets[..., None], -1)[..., 0]
        return (nll * wanted).sum()

    return lambda parameters: loss(parameters, targets, wanted)


@pytest.mark.parametrize("kind", ["attention", "linear", "mlp"])
def test_gradient_reaches_the_projector_and_equals_finite_differences(kind: str) -> None:
    model = tiny_model(kind, scale=1.0)
    loss, parameters = loss_of(model), model.projector.parameters()
    value, grads = mx.value_and_grad(loss)(parameters)
    compiled_value, compiled = mx.compile(mx.value_and_grad(loss))(parameters)
    assert compiled_value.item() == pytest.approx(value.item(), rel=1e-5)
    names = [name for name, _ in tree_flatten(parameters)]
    for name, grad in tree_flatten(compiled):
        np.testing.assert_allclose(np.array(grad), np.array(dict(tree_flatten(grads))[name]), atol=2e-4)
    rng = np.random.default_rng(0)
    for chosen in ["markers", *(n for n in names if n.startswith("body") and n.endswith("weight"))][:6]:
        flat, grad = dict(tree_flatten(parameters)), dict(tree_flatten(grads))[chosen]
        # Random steps along the gradient's signs: nothing cancels, and a component that is missing shows.
        sizes = mx.array(rng.uniform(0.5, 1.5, grad.shape).astype(np.float32))
        direction = sizes * mx.where(grad >= 0, 1, -1)
        step = 1e-3
        up, down = (
            loss(tree_unflatten([*(flat | {chosen: flat[chosen] + s * direction}).items()])).item()
            for s in (step, -step)
        )
        numeric = (up - down) / (2 * step)
        analytic = (grad * direction).sum().item()
        assert analytic > 0.1, chosen
        assert numeric == pytest.approx(analytic, rel=0.03), chosen
    model.projector.update(parameters)


def test_unused_markers_get_no_gradient(model: Llama3V) -> None:
    used = ROWS[1:2]
    grads = mx.grad(loss_of(model, used))(model.projector.parameters())
    assert (mx.abs(grads["markers"]).max(axis=1) > 0).all().item()
    grads = mx.grad(loss_of(model, [("What?", [picture(PLAIN, 2)])]))(model.projector.parameters())
    assert (mx.abs(grads["markers"]).max(axis=1) > 0).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_touches_the_decoder_only(bits: int) -> None:
    model = tiny_model(scale=1.0, hidden_size=64)
    before = {name: np.array(v) for name, v in tree_flatten(model.projector.parameters())}
    exact = logits(model, ROWS)
    settings = quantize_decoder(model, bits=bits, group_size=32)
    assert settings == {"group_size": 32, "bits": bits, "mode": "affine"}
    names = dict(tree_flatten(model.parameters()))
    scaled = [name for name in names if name.endswith(".scales")]
    assert len(scaled) == 2 * 7 + 2 and all(name.startswith("language_model.") for name in scaled)
    for name, value in tree_flatten(model.projector.parameters()):
        np.testing.assert_array_equal(np.array(value), before[name])
    error = max(np.abs(a - b).max() for a, b in zip(exact, logits(model, ROWS), strict=True))
    scale = max(np.abs(a).max() for a in exact)
    assert 0 < error < {4: 0.6, 8: 0.05}[bits] * scale

    again = tiny_model(seed=1, scale=1.0, hidden_size=64)
    quantize_decoder(again, bits=bits, group_size=32, stored=names)
    again.load_weights(list(names.items()), strict=True)
    np.testing.assert_array_equal(logits(again, ROWS)[0], logits(model, ROWS)[0])
    partly = tiny_model(scale=1.0, hidden_size=64)
    quantize_decoder(partly, bits=bits, group_size=32, stored={"language_model.lm_head.scales"})
    assert sum(name.endswith(".scales") for name, _ in tree_flatten(partly.parameters())) == 1


def test_sanitize_drops_what_no_module_has() -> None:
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model()
    weights = dict(tree_flatten(untied.parameters()))
    extra = weights | {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(4)}
    assert untied.sanitize(extra).keys() == weights.keys()
    assert untied.sanitize(untied.sanitize(extra)).keys() == weights.keys()
    assert weights.keys() - tied.sanitize(weights).keys() == {"language_model.lm_head.weight"}


@pytest.mark.parametrize("tie", [False, True])
def test_call_is_logits_of_hidden(tie: bool) -> None:
    model = tiny_model(tie_word_embeddings=tie)
    ids = mx.array([TOKENS.encode("What does the sign say?")])
    hidden = model.hidden(ids)
    assert hidden.shape == (1, ids.shape[1], 32)
    np.testing.assert_allclose(np.array(model.logits(hidden[:, 3])), np.array(model(ids)[:, 3]), atol=1e-4)
    same = model(ids, input_embeddings=model.embed(ids))
    np.testing.assert_array_equal(np.array(same), np.array(model(ids)))


def test_lora_finds_the_blocks() -> None:
    model = tiny_model()
    model.freeze()
    settings = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, -1, settings)
    assert len(tree_flatten(model.trainable_parameters())) == 2 * 2 * 2

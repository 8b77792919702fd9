"""Markers, placeholders of pictures and padding of the vocabulary: they stand in prompts, and in no answer."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from mlx_llama3v.inference import Sampling, Session
from mlx_llama3v.inference import batch as batches
from mlx_llama3v.inference import session as sessions
from mlx_llama3v.inference.batch import Request, batch_generate
from mlx_llama3v.layout import LAYOUTS
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.text.tokens import Tokens
from tests.hf_llama import tiny_tokenizer
from tests.tiny_model import picture, tiny_model

SIZE = tiny_tokenizer().get_vocab_size()


def extended(*names: str, layout: str = "llama3v", stop: tuple[str, ...] = (), special: bool = True) -> Tokens:
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    added = [AddedToken(name, normalized=False, special=special) for name in names]
    tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    ends = [tokenizer.token_to_id(name) for name in stop]
    return Tokens(tokenizer, eos_token_ids=ends, layout=LAYOUTS[layout])


def test_what_is_unsaid() -> None:
    ours = extended()
    assert ours.unsaid(SIZE) == ours.marker_ids
    assert not set(ours.unsaid(SIZE)) & ours.stop
    llava = extended("<image>", layout="llama3")
    assert llava.unsaid(SIZE + 4) == (*llava.marker_ids, *range(SIZE, SIZE + 4))  # <image> and three of padding
    assert llava.unsaid(SIZE + 1) == (*llava.marker_ids, SIZE)
    mantis = extended("<image>", "<|pad|>", layout="mantis")
    assert mantis.unsaid(SIZE + 2) == (*mantis.marker_ids, SIZE, SIZE + 1)
    chatty = extended("<|im_start|>", "<|im_end|>", stop=("<|im_end|>",))
    assert chatty.unsaid(SIZE + 2) == (*chatty.marker_ids, SIZE)  # what ends an answer must be sayable
    word = extended("radiograph", special=False)
    assert word.unsaid(SIZE + 1) == word.marker_ids


def test_placeholders_among_the_reserved_ids_are_unsaid() -> None:
    """MiniCPM has renamed reserved tokens; those it may write (`<ref>`, `<box>`) stay."""
    text = tiny_tokenizer().to_str()
    names = ["<unk>", "<image>", "</image>", "<slice>", "</slice>", "<ref>", "</ref>"]
    for n, name in enumerate(names):
        text = text.replace(f"<|reserved_special_token_{n}|>", name)
    tokens = Tokens(Tokenizer.from_str(text), layout=LAYOUTS["minicpm"])
    ids = {name: Tokenizer.from_str(text).token_to_id(name) for name in names}
    unsaid = set(tokens.unsaid(SIZE)) - set(tokens.marker_ids)
    assert unsaid == {ids[name] for name in names[:5]}


@pytest.fixture(scope="module")
def model() -> Llama3V:
    return tiny_model(vocab_size=SIZE + 3)


@pytest.fixture
def tempted(model: Llama3V, monkeypatch: pytest.MonkeyPatch) -> Tokens:
    """The tokens of a model that would say nothing else."""
    tokens = extended("<image>", layout="llama3")
    push = np.zeros(model.vocab_size, np.float32)
    push[list(tokens.unsaid(model.vocab_size))] = 1000
    logits = Llama3V.logits
    monkeypatch.setattr(Llama3V, "logits", lambda self, hidden: logits(self, hidden) + mx.array(push))
    return tokens


def said(model: Llama3V, tokens: Tokens) -> set[int]:
    """All tokens of greedy and sampled answers, alone and in a batch."""
    found: set[int] = set()
    for sampling in (
        Sampling(max_tokens=6),
        Sampling(max_tokens=6, temp=1.0, seed=1, top_p=0.9, min_p=0.01, top_k=50),
        Sampling(max_tokens=6, repetition_penalty=1.3),
    ):
        pieces = list(Session(model, tokens).ask("What is it?", [picture()], sampling))
        assert pieces[-1].answer is not None
        found.update(pieces[-1].answer.tokens)
        requests = [Request((Message("user", text, (0,)),), (picture(seed=n),)) for n, text in enumerate("abc")]
        for answer in batch_generate(model, tokens, requests, sampling=sampling):
            found.update(answer.tokens)
    return found


def test_no_answer_holds_them(model: Llama3V, tempted: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    unsaid = set(tempted.unsaid(model.vocab_size))
    spoken = said(model, tempted)
    assert spoken and not spoken & unsaid
    for module in (sessions, batches):  # twin: without the mask all of them would be
        monkeypatch.setattr(module, "never", lambda unsaid, vocabulary: None)
    assert said(model, tempted) <= unsaid

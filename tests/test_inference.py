"""Answers: the KV cache, batches and streams change nothing; stops, limits and interruptions are kept to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_llama3v import checkpoint
from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.encoder import load_encoder
from mlx_llama3v.errors import ContextError, ImageError
from mlx_llama3v.inference import (
    Answer,
    Request,
    Sampling,
    Session,
    batch_generate,
    embed_rows,
    generate,
    load,
    stream,
)
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import FIRST_VISUAL, Message, Rendered, render
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.vision.siglip import VisionTower
from tests.hf_llama import tiny_tokenizer, write_tokenizer
from tests.tiny_model import PLAIN, SPLIT, picture, tiny_model, tiny_tokens

TOKENS = tiny_tokens()
TURNS = [
    ("What is it?", []),
    ("Look at this one.", [picture(SPLIT, 1)]),
    ("And now?", []),
    ("Compare these.", [picture(PLAIN, 2), picture(SPLIT, 3)]),
]


@pytest.fixture
def model() -> Llama3V:
    return tiny_model()


def answer(session: Session, text: str, images=(), **sampling) -> Answer:
    pieces = list(session.ask(text, images, Sampling(**sampling)))
    last = pieces[-1].answer
    assert last is not None and all(piece.answer is None for piece in pieces[:-1])
    assert last.text == "".join(piece.text for piece in pieces) == session.tokens.decode(last.tokens)
    return last


def uncached(model: Llama3V, row: Rendered, pictures, max_tokens: int, stop=TOKENS.stop) -> list[int]:
    """Greedy decoding as the definition has it: the whole sequence anew for every token. Markers are never said."""
    _, vectors = embed_rows(model, [row], [pictures])
    found: list[int] = []
    unsaid = mx.array(TOKENS.unsaid(model.vocab_size))
    while len(found) < max_tokens:
        scores = model(None, input_embeddings=vectors)[0, -1]
        scores[unsaid] = -mx.inf
        token = int(mx.argmax(scores).item())
        if token in stop:
            break
        found.append(token)
        vectors = mx.concatenate([vectors, model.embed(mx.array([[token]]))], axis=1)
    return found


class Transcript:
    """The whole conversation as one row, kept by hand beside a session."""

    def __init__(self, model: Llama3V, tokens: Tokens = TOKENS) -> None:
        self.model, self.stop, self.ids, self.source = model, tokens.stop, [], []
        self.pictures: list[Encoded] = []

    def ask(self, text: str, images, max_tokens: int) -> list[int]:
        projector = self.model.config.projector_config
        before = sum(projector.num_tokens(grid) for p in self.pictures for grid in p.layout.grids)
        message = Message("user", text, tuple(range(len(images))))
        layouts = [p.layout for p in images]
        turn = render([message], layouts, TOKENS, projector, generate=True, start=not self.ids)
        self.ids += turn.ids.tolist()
        self.source += np.where(turn.source >= FIRST_VISUAL, turn.source + before, turn.source).tolist()
        self.pictures += images
        ids, source = np.array(self.ids, np.int32), np.array(self.source, np.int32)
        found = uncached(self.model, Rendered(ids, source, source > 0), self.pictures, max_tokens, self.stop)
        self.note(found)
        return found

    def note(self, tokens: list[int]) -> None:
        self.ids += tokens
        self.source += [0] * len(tokens)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_every_turn_equals_a_fresh_full_prefill(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind)
    session, transcript = Session(model, TOKENS), Transcript(model)
    seen: list[int] = []
    answers: list[tuple[int, ...]] = []
    hidden = Llama3V.hidden

    def counted(self, inputs, cache=None, input_embeddings=None):
        seen.append(input_embeddings.shape[1] if cache and input_embeddings is not None else 0)
        return hidden(self, inputs, cache, input_embeddings)

    monkeypatch.setattr(Llama3V, "hidden", counted)
    for text, images in TURNS:
        cached = len(session.ids)
        seen.clear()
        found = answer(session, text, images, max_tokens=7)
        prefilled = sum(seen)
        assert list(found.tokens) == transcript.ask(text, images, 7)
        assert session.ids == transcript.ids
        assert (found.cached_tokens, found.prompt_tokens) == (cached, prefilled)
        assert cached + prefilled + len(found.tokens) == len(session.ids)
        answers.append(found.tokens)
    # Twin: with another picture in turn 2, the answer to turn 3, which brings none, is another one.
    other = Session(model, TOKENS)
    turns = [TURNS[0], (TURNS[1][0], [picture(SPLIT, 9)]), TURNS[2]]
    changed = [answer(other, text, images, max_tokens=7).tokens for text, images in turns]
    assert changed[0] == answers[0] and changed[2] != answers[2]


def test_the_first_turn_is_what_training_renders(model: Llama3V) -> None:
    session = Session(model, TOKENS, system="Be brief.")
    found = answer(session, *TURNS[3], max_tokens=3)
    messages = [Message("system", "Be brief."), Message("user", "Compare these.", (0, 1))]
    row = render(messages, [PLAIN, SPLIT], TOKENS, model.config.projector_config, generate=True)
    assert session.ids == [*row.ids.tolist(), *found.tokens]
    answer(session, "And now?", max_tokens=3)
    assert session.ids.count(TOKENS.bos) == 1 and TOKENS.decode(session.ids).count("Be brief.") == 1


def test_reset_forgets(model: Llama3V) -> None:
    session = Session(model, TOKENS)
    first = answer(session, *TURNS[1], max_tokens=5)
    answer(session, *TURNS[2], max_tokens=5)
    session.reset()
    assert answer(session, *TURNS[1], max_tokens=5).tokens == first.tokens


def test_an_answer_left_early_is_cut_off_there(model: Llama3V) -> None:
    session, transcript = Session(model, TOKENS), Transcript(model)
    pieces = session.ask(*TURNS[1], Sampling(max_tokens=30))
    next(pieces), next(pieces)
    pieces.close()
    whole = transcript.ask(*TURNS[1], 30)
    heard = len(session.ids) - (len(transcript.ids) - len(whole))
    assert 2 <= heard < 30 and session.ids == transcript.ids[: len(session.ids)]
    transcript.ids, transcript.source = (
        transcript.ids[: len(session.ids)],
        transcript.source[: len(session.ids)],
    )
    assert list(answer(session, *TURNS[3], max_tokens=6).tokens) == transcript.ask(*TURNS[3], 6)


def test_a_turn_interrupted_in_its_prefill_never_was(model: Llama3V, monkeypatch: pytest.MonkeyPatch) -> None:
    session, transcript = Session(model, TOKENS), Transcript(model)
    assert list(answer(session, *TURNS[0], max_tokens=4).tokens) == transcript.ask(*TURNS[0], 4)
    with monkeypatch.context() as patch:
        patch.setattr(Llama3V, "logits", lambda self, hidden: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answer(session, *TURNS[1], max_tokens=4)
    assert session.ids == transcript.ids
    assert list(answer(session, *TURNS[3], max_tokens=4).tokens) == transcript.ask(*TURNS[3], 4)


def test_a_turn_that_never_starts_leaves_nothing(model: Llama3V) -> None:
    session = Session(model, TOKENS)
    answer(session, *TURNS[0], max_tokens=4)
    before = list(session.ids)
    session.ask(*TURNS[1])  # not read
    with pytest.raises(ContextError, match="no visual tokens"):
        session.ask("x", [Encoded(SliceLayout((0, 3)), np.zeros((0, 12), np.float32))])
    with pytest.raises(ContextError, match="no vision tower"):
        session.ask("x", ["picture.png"])
    assert session.ids == before


def swapped(model: Llama3V, one: int, other: int) -> Llama3V:
    """The model that says `other` where it said `one`."""
    rows = np.arange(model.language_model.lm_head.weight.shape[0])
    rows[[one, other]] = [other, one]
    model.language_model.lm_head.weight = model.language_model.lm_head.weight[mx.array(rows)]
    return model


@pytest.mark.parametrize("stop", [TOKENS.eot, TOKENS.end_of_text, 308])
def test_every_stop_id_ends_an_answer(model: Llama3V, stop: int) -> None:
    tokens = Tokens(tiny_tokenizer(), eos_token_ids=[308])
    free = answer(Session(model, tokens), *TURNS[1], max_tokens=20).tokens
    place = next(i for i in range(3, 20) if free[i] not in free[:i])
    ended = Session(swapped(model, free[place], stop), tokens)
    found = answer(ended, *TURNS[1], max_tokens=20)
    assert found.tokens == free[:place] and found.finish_reason == "stop"
    assert stop not in ended.ids[-place - 2 :]
    # The next turn sees <|eot_id|> after the answer, whichever id ended it, and once only.
    transcript = Transcript(ended.model, tokens)
    assert transcript.ask(*TURNS[1], 20) == list(found.tokens)
    assert list(answer(ended, *TURNS[2], max_tokens=5).tokens) == transcript.ask(*TURNS[2], 5)
    assert ended.ids == transcript.ids
    messages = [Message("user", TURNS[1][0], (0,))]
    (batched,) = batch_generate(model, tokens, [Request(tuple(messages), tuple(TURNS[1][1]))], 20)
    assert (batched.tokens, batched.finish_reason) == (found.tokens, "stop")


def test_max_tokens_is_a_limit(model: Llama3V) -> None:
    found = answer(Session(model, TOKENS), *TURNS[1], max_tokens=5)
    assert (len(found.tokens), found.finish_reason) == (5, "length")
    with pytest.raises(ContextError, match="max_tokens is 0"):
        Sampling(max_tokens=0)


def test_the_context_is_a_limit() -> None:
    model = tiny_model(max_position_embeddings=60)
    session = Session(model, TOKENS)
    found = answer(session, "x", [picture(SPLIT, 1)], max_tokens=500)
    assert found.finish_reason == "length" and len(session.ids) == 60
    with pytest.raises(ContextError, match=r"tokens long .* the context holds 60"):
        session.ask("More?")
    session.reset()
    assert answer(session, "x", max_tokens=2).tokens
    long = Request((Message("user", "word " * 60),))
    with pytest.raises(ContextError, match="context holds 60"):
        batch_generate(model, TOKENS, [long])
    (cut,) = batch_generate(model, TOKENS, [Request((Message("user", "x", (0,)),), (picture(SPLIT, 1),))], 500)
    assert cut.tokens == found.tokens


def requests() -> list[Request]:
    asked = [Request((Message("user", text, tuple(range(len(p)))),), tuple(p)) for text, p in TURNS]
    chat = (Message("system", "Be brief."), Message("user", "One?", (1,)), Message("assistant", "Two."))
    asked.append(Request((*chat, Message("user", "Three?", (0,))), (picture(PLAIN, 5), picture(SPLIT, 6))))
    asked.append(Request((Message("user", "", (0,)),), (picture(SPLIT, 7),), caption=True))
    return asked


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_a_batch_equals_one_by_one(kind: str) -> None:
    model, asked = tiny_model(kind), requests()
    alone = []
    for r in asked:
        layouts, projector = [p.layout for p in r.pictures], model.config.projector_config
        row = render(r.messages, layouts, TOKENS, projector, generate=True, caption=r.caption)
        alone.append(tuple(uncached(model, row, r.pictures, 9)))
    assert len({tokens[:3] for tokens in alone}) > 3  # answers differ, so that a mix-up would show
    # Rows end at different times: give them a stop id that some of them say early.
    stop = next(t for t in alone[0][2:] if 0 < sum(t in tokens for tokens in alone) < len(alone))
    tokens = Tokens(tiny_tokenizer(), eos_token_ids=[stop])
    ended = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    for size in (1, 2, 32):
        found = batch_generate(model, tokens, asked, max_tokens=9, batch_size=size)
        assert [a.tokens for a in found] == ended
        assert [a.finish_reason for a in found] == ["stop" if stop in ids else "length" for ids in alone]
        assert [a.text for a in found] == [tokens.decode(ids) for ids in ended]
    assert batch_generate(model, tokens, []) == []


def test_sampling(model: Llama3V) -> None:
    def said(**sampling) -> tuple[int, ...]:
        return answer(Session(model, TOKENS), *TURNS[1], max_tokens=12, **sampling).tokens

    greedy = said()
    assert said(temp=1.0, seed=1) == said(temp=1.0, seed=1) != said(temp=1.0, seed=2)
    assert said(temp=1.0, top_k=1, seed=1) == said(temp=1.0, top_p=1e-6, seed=2) == greedy
    assert said(temp=1.0, min_p=0.999, seed=1) == greedy != said(temp=3.0, seed=1)
    assert said(repetition_penalty=50.0) != greedy or len(set(greedy)) == 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a vision tower, and a picture in it."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    model = tiny_model()
    tower = VisionTower(model.config.vision_config)
    config = replace(model.config, marker_ids=TOKENS.marker_ids, eos_token_ids=(308,))
    weights = [*tree_flatten(model.parameters())]
    weights += [(f"vision_tower.{name}", value) for name, value in tree_flatten(tower.parameters())]
    write_tokenizer(path.parent / "files", tiny_tokenizer())
    tokenizer = path.parent / "files" / "tokenizer.json"
    checkpoint.save_model(path, config, weights, files={"tokenizer.json": tokenizer})
    pixels = np.random.default_rng(0).integers(0, 255, (40, 70, 3), np.uint8)
    Image.fromarray(pixels).save(path.parent / "picture.png")
    return path


def test_load_generate_stream(directory: Path, model: Llama3V) -> None:
    image = directory.parent / "picture.png"
    session = load(directory)
    assert 308 in session.tokens.stop
    text = generate(session, "What is it?", images=[image], max_tokens=8)
    assert text == generate(session, "What is it?", images=[image.read_bytes()], max_tokens=8)
    assert text == "".join(stream(session, "What is it?", [str(image)], max_tokens=8))
    encoded = load_encoder(directory).embed(image)
    assert len(encoded.layout.grids) > 1
    assert text == answer(Session(model, session.tokens), "What is it?", [encoded], max_tokens=8).text
    with pytest.raises(ImageError):
        generate(session, "What is it?", images=[directory / "config.json"])


def test_load_without_a_vision_tower(directory: Path, model: Llama3V, tmp_path: Path) -> None:
    files = {"tokenizer.json": directory / "tokenizer.json"}
    checkpoint.save_model(tmp_path / "text", model.config, tree_flatten(model.parameters()), files=files)
    session = load(tmp_path / "text")
    assert generate(session, "What is it?", max_tokens=4)
    with pytest.raises(ContextError, match="no vision tower"):
        generate(session, "What is it?", images=["x.png"])

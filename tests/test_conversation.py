"""Sessions over many turns, retries and edits; what ends an answer; memory options."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama3v.compat import KVCache
from mlx_llama3v.config import Encoded
from mlx_llama3v.errors import CheckpointError, ContextError
from mlx_llama3v.inference import Answer, Memory, Request, Sampling, Session, batch_generate, load
from mlx_llama3v.inference.answer import Loops, Writer
from mlx_llama3v.inference.batch import Running
from mlx_llama3v.inference.prefixes import Prefixes
from mlx_llama3v.inference.rows import common, place_keys
from mlx_llama3v.inference.sampling import CYCLES, Sampler
from mlx_llama3v.layout import LAYOUTS
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import Message, render
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.vision.encode import Encoder
from tests.hf_llama import tiny_tokenizer
from tests.serving import make_directory, png
from tests.test_inference import Transcript
from tests.tiny_model import PLAIN, SPLIT, picture, tiny_model, tiny_tokens

TOKENS = tiny_tokens()
SIX = [
    ("What is it?", []),
    ("Look at this one.", [picture(SPLIT, 1)]),
    ("And now?", []),
    ("Compare these.", [picture(PLAIN, 2), picture(SPLIT, 3)]),
    ("Sure?", []),
    ("This?", [picture(PLAIN, 4)]),
]


@pytest.fixture
def model() -> Llama3V:
    return tiny_model(max_position_embeddings=1000)


def answer(session: Session, text: str, images=(), **sampling) -> Answer:
    return list(session.ask(text, images, Sampling(**sampling)))[-1].answer


def fresh(session: Session) -> Session:
    """Another session in the same conversation, with an empty cache."""
    other = Session(session.model, session.tokens, system=session.system)
    other.ids, other.turns = list(session.ids), list(session.turns)
    other._source, other._pictures = list(session._source), list(session._pictures)
    return other


@pytest.mark.parametrize("step", [2048, 7])
def test_six_turns_equal_a_fresh_prefill_each(model: Llama3V, step: int) -> None:
    session, transcript = Session(model, TOKENS, memory=Memory(prefill_step_size=step)), Transcript(model)
    for text, images in SIX:
        found = answer(session, text, images, max_tokens=6)
        assert list(found.tokens) == transcript.ask(text, images, 6) and session.ids == transcript.ids
    assert found.visual_tokens == 2 and found.slices == 1 and found.prompt_tokens < 40 < found.cached_tokens


def test_an_edit_and_a_retry_equal_a_fresh_prefill(model: Llama3V) -> None:
    session = Session(model, TOKENS)
    for text, images in SIX[:4]:
        answer(session, text, images, max_tokens=6)
    again = session.undo()
    assert (again.text, len(again.pictures), len(session.turns)) == ("Compare these.", 2, 3)
    whole = answer(fresh(session), "Compare both?", again.pictures, max_tokens=6)
    edited = answer(session, "Compare both?", again.pictures, max_tokens=6)
    assert edited.tokens == whole.tokens and whole.cached_tokens == 0
    assert edited.prompt_tokens < 25 < edited.visual_tokens + 25  # the pictures stayed where they were
    session.undo()
    loud = picture(SPLIT, 9)
    other = [picture(PLAIN, 2), Encoded(SPLIT, 9 * loud.patches)]  # the second picture differs, the first may stay
    whole = answer(fresh(session), "Compare both?", other, max_tokens=6)
    changed = answer(session, "Compare both?", other, max_tokens=6)
    assert changed.tokens == whole.tokens != edited.tokens and changed.prompt_tokens > edited.prompt_tokens
    session.undo()
    assert answer(session, "Compare both?", other, max_tokens=6).prompt_tokens == 1  # a retry: the last token only
    for _ in range(4):
        session.undo()
    assert session.undo() is None and session.ids == []
    assert answer(session, *SIX[1], max_tokens=6).tokens == answer(Session(model, TOKENS), *SIX[1], max_tokens=6).tokens


def test_an_answer_that_is_dropped_for_another_question(model: Llama3V) -> None:
    session = Session(model, TOKENS)
    dropped = session.ask(*SIX[1], Sampling(max_tokens=30))
    next(dropped), next(dropped)
    second = session.ask(*SIX[2], Sampling(max_tokens=6))  # the first one is neither closed nor read to its end
    kept, last = len(session.ids), list(second)[-1].answer
    assert list(dropped) == [] and len(session.turns) == 2 and session.turns[1].start == kept
    session.undo()
    assert answer(fresh(session), *SIX[2], max_tokens=6).tokens == last.tokens


def test_an_answer_that_is_dropped_and_read_on_beside_another(model: Llama3V) -> None:
    session = Session(model, TOKENS)
    dropped = session.ask(*SIX[1], Sampling(max_tokens=30))
    next(dropped), next(dropped)
    second = session.ask(*SIX[2], Sampling(max_tokens=9))
    pieces = [next(second), *dropped, *second]
    other = fresh(session)
    other.undo()
    assert pieces[-1].answer.tokens == answer(other, *SIX[2], max_tokens=9).tokens


@pytest.mark.parametrize("place", ["before", "within"])
@pytest.mark.parametrize("count", [2, 4, 7, 8])  # in the second prefill, or while decoding; in either layer
def test_an_interrupt_between_two_layers(
    model: Llama3V, monkeypatch: pytest.MonkeyPatch, count: int, place: str
) -> None:
    session, calls = Session(model, TOKENS), []
    answer(session, *SIX[1], max_tokens=6)
    update = KVCache.update_and_fetch

    def interrupted(self, keys, values):
        calls.append(self)
        if len(calls) == count:
            self.offset += keys.shape[2] * (place == "within")  # as update_and_fetch does first
            raise KeyboardInterrupt
        return update(self, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update_and_fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(session, *SIX[3], max_tokens=6)
    expected = answer(fresh(session), "And now?", max_tokens=8).tokens
    assert answer(session, "And now?", max_tokens=8).tokens == expected


@pytest.mark.parametrize("heard", [1, 2])
def test_an_answer_left_early(model: Llama3V, heard: int) -> None:
    left = 0  # with the last token heard, which is not in the cache yet
    for n in range(10):
        session = Session(model, TOKENS)
        pieces = session.ask(f"{n}?", (), Sampling(max_tokens=20))
        for _ in range(heard):
            next(pieces)
        pieces.close()
        left += len(session.ids) == session.turns[0].length + heard
        again = answer(fresh(session), "And now?", max_tokens=8).tokens
        assert answer(session, "And now?", max_tokens=8).tokens == again
    assert left


@pytest.mark.parametrize("layout", LAYOUTS)
def test_restore_goes_on_where_it_was(model: Llama3V, layout: str) -> None:
    tokens = Tokens(tiny_tokenizer(), layout=LAYOUTS[layout])
    session = Session(model, tokens, system="Be brief.")
    session.restore([("Look.", [picture(SPLIT, 1)], "It says stop."), ("And?", [], "a red circle")])
    messages = [
        Message("system", "Be brief."), Message("user", "Look.", (0,)), Message("assistant", "It says stop."),
        Message("user", "And?"), Message("assistant", "a red circle"), Message("user", "Sure?"),
    ]  # fmt: skip
    row = render(messages, [SPLIT], tokens, model.config.projector_config, generate=True)
    found = answer(session, "Sure?", max_tokens=4)
    assert session.ids == [*row.ids.tolist(), *found.tokens] and found.cached_tokens == 0
    assert [text.strip() for text in session.answers()[:2]] == ["It says stop.", "a red circle"]


def test_a_picture_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(make_directory(tmp_path / "model"))
    (tmp_path / "a.png").write_bytes(png(1))
    counted: list[object] = []
    embed = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda self, source: (counted.append(source), embed(self, source))[1])
    answer(session, "What?", [tmp_path / "a.png"], max_tokens=3)
    answer(session, "And now?", max_tokens=3)
    session.undo()
    answer(session, "Again?", [png(1)], max_tokens=3)
    assert len(counted) == 1
    (tmp_path / "a.png").write_bytes(png(2))
    answer(session, "Again?", [tmp_path / "a.png"], max_tokens=3)
    assert len(counted) == 2


def test_memory_options(model: Llama3V) -> None:
    small = Session(model, TOKENS, memory=Memory(max_kv_size=40))
    assert answer(small, "What?", max_tokens=500).finish_reason in ("length", "repetition") and len(small.ids) <= 40
    with pytest.raises(ContextError, match=r"context holds 40; .*--max-slices"):
        small.ask("x", [picture(SPLIT, 1)] * 4)
    with pytest.raises(ContextError, match="heads of 8 values"):
        Session(model, TOKENS, memory=Memory(kv_bits=8))
    with pytest.raises(ContextError, match="kv_bits is 3"):
        Memory(kv_bits=3)
    wide = tiny_model(hidden_size=128, head_dim=32, max_position_embeddings=1000)
    exact, coarse = Session(wide, TOKENS), Session(wide, TOKENS, memory=Memory(kv_bits=8))
    for text, images in SIX[:3]:
        found = answer(coarse, text, images, max_tokens=5)
        answer(exact, text, images, max_tokens=5)
    assert found.cached_tokens > 30 and coarse._cache[0].bits == 8 and exact._cache[0].offset == coarse._cache[0].offset
    assert coarse._cache[0].nbytes < exact._cache[0].nbytes / 2


def test_memory_options_of_a_batch(model: Llama3V, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request((Message("user", f"{n}?"),)) for n in range(5)]
    lengths = []
    hidden = Llama3V.hidden
    monkeypatch.setattr(Llama3V, "hidden", lambda *a, **k: lengths.append(a[1].size) or hidden(*a, **k))
    stopless = tiny_tokens()
    stopless.stop = frozenset()
    free = batch_generate(model, stopless, requests, 8)
    whole, lengths[:] = max(lengths), []
    bounded = batch_generate(model, stopless, requests, 8, max_context=free[0].prompt_tokens + 3, prefill_step_size=4)
    assert [found.tokens for found in bounded] == [found.tokens[:3] for found in free]
    assert max(lengths) <= 5 < whole
    with pytest.raises(ContextError, match="context holds 4"):
        batch_generate(model, TOKENS, requests, max_context=4)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [(Memory, "max_kv_size", 0), (Memory, "prefill_step_size", 0), (Sampling, "temp", float("nan")),
     (Sampling, "top_p", 0.0), (Sampling, "min_p", 2.0), (Sampling, "top_k", -1), (Sampling, "stop", ("",)),
     (Sampling, "repetition_penalty", 0.0), (Sampling, "loop_guard", -1), (Sampling, "loop_guard", 3)],
)  # fmt: skip
def test_an_option_that_is_wrong_is_named_alone(cls: type, name: str, value: object) -> None:
    with pytest.raises(ContextError, match=f"^{name} is .*; expected"):
        cls(**{name: value})


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    path = make_directory(tmp_path / "model")
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        load(path)


# --- what ends an answer


def said(text: str, stop: tuple[str, ...]) -> tuple[str, list[str], Writer]:
    writer, pieces = Writer(TOKENS, Sampling(stop=stop), 100), []
    for token in TOKENS.encode(text):
        pieces.append(writer.add(token))
        if writer.finish:
            break
    pieces.append(writer.close("length"))
    return writer.text, pieces, writer


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("a red circle", ("circle",), "a red "),
        ("a red circle", ("cle",), "a red cir"),
        ("a red circle", ("d c", "red"), "a "),
        ("aab aac", ("aac",), "aab "),
        ("It says stop. sto", ("stop!",), "It says stop. sto"),
        ("grün", ("ün",), "gr"),
        ("a red circle", (), "a red circle"),
    ],
)
def test_stop_texts(text: str, stop: tuple[str, ...], left: str) -> None:
    found, pieces, writer = said(text, stop)
    assert found == left == "".join(pieces)
    assert left.startswith(TOKENS.decode(writer.tokens))
    assert writer.finish == ("stop" if left != text else "length")


def test_a_stop_text_in_every_path(model: Llama3V) -> None:
    free = answer(Session(model, TOKENS), *SIX[1], max_tokens=20)
    stop = free.text[4:7]
    found = answer(Session(model, TOKENS), *SIX[1], max_tokens=20, stop=(stop,))
    assert found.text == free.text[: free.text.index(stop)] and found.finish_reason == "stop"
    request = Request((Message("user", SIX[1][0], (0,)),), tuple(SIX[1][1]))
    (batched,) = batch_generate(model, TOKENS, [request], sampling=Sampling(max_tokens=20, stop=(stop,)))
    assert (batched.text, batched.tokens, batched.finish_reason) == (found.text, found.tokens, "stop")


def test_loops_end(model: Llama3V) -> None:
    def ends(tokens: list[int], length: int = 24) -> int | None:
        loops = Loops(length)
        return next((n for n, token in enumerate(tokens, 1) if loops.add(token)), None)

    assert ends([7] * 100) == 24 and ends([1, 2, 3, 4, 5, 6] * 10) == 24
    assert ends([9, 9, 1, *[1, 2] * 50]) == 3 + 24
    assert ends(list(range(7)) * 20) is None  # seven tokens: fewer than four times in 24
    assert ends([1, 2, 3, 4] * 5 + [9] + [1, 2, 3, 4] * 5) is None and ends([7] * 100, 0) is None
    assert ends([7] * 100, CYCLES) == CYCLES and Sampling(loop_guard=CYCLES) and Sampling(loop_guard=0)
    found = answer(Session(model, TOKENS), "What?", max_tokens=900, loop_guard=40)
    assert found.finish_reason == "repetition" and len(found.tokens) < 900
    request = Request((Message("user", "What?"),))
    (batched,) = batch_generate(model, TOKENS, [request], sampling=Sampling(max_tokens=900, loop_guard=40))
    assert (batched.tokens, batched.finish_reason) == (found.tokens, "repetition")


def test_sampled_batches_equal_one_by_one(model: Llama3V) -> None:
    sampling = Sampling(max_tokens=9, temp=1.2, top_p=0.95, top_k=50, min_p=0.01, repetition_penalty=1.3, seed=3)
    requests = [Request((Message("user", text, tuple(range(len(p)))),), tuple(p)) for text, p in SIX]
    together = [found.tokens for found in batch_generate(model, TOKENS, requests, sampling=sampling, batch_size=4)]
    alone = [list(Session(model, TOKENS).ask(text, images, sampling))[-1].answer.tokens for text, images in SIX]
    assert together == alone and len(set(alone)) == 6
    for wrong in ({"top_p": 0.0}, {"min_p": 2.0}, {"top_k": -1}, {"repetition_penalty": 0.0}, {"stop": ("",)}):
        with pytest.raises(ContextError):
            Sampling(**wrong)


def test_a_session_samples_as_a_batch_does(model: Llama3V) -> None:
    sampling = Sampling(max_tokens=12, temp=0.8, top_k=40, seed=5, repetition_penalty=1.6)
    for n in range(6):
        request = Request((Message("user", f"What is {n}, what is {n}?", (0,)),), (picture(PLAIN, n),))
        (batched,) = batch_generate(model, TOKENS, [request], sampling=sampling)
        session = Session(model, TOKENS, memory=Memory(prefill_step_size=5))
        alone = list(session.ask(request.messages[0].text, request.pictures, sampling))[-1].answer
        assert alone.tokens == batched.tokens


def test_every_place_has_its_own_random_number() -> None:
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temp=1.0, seed=seed))
        return [int(sampler.choose(mx.zeros((1, 8))).item()) for _ in range(240)]

    one, two = drawn(1), drawn(2)
    assert one == drawn(1) and sum(a == b for a, b in zip(one, two, strict=True)) < 60
    assert all(12 < one.count(token) < 60 for token in range(8))
    assert sum(a == b for a, b in pairwise(one)) < 60


def test_rows_join_and_leave(model: Llama3V, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = Running.step
    monkeypatch.setattr(Running, "step", lambda self: (sizes.append(len(self.rows)), step(self))[1])
    stopping = tiny_tokens()
    free = batch_generate(model, TOKENS, [Request((Message("user", f"{n}?"),)) for n in range(9)], 12)
    stopping.stop |= {free[0].tokens[4], free[5].tokens[2]}
    requests = [Request((Message("user", f"{n}?"),)) for n in range(9)]
    sizes.clear()
    told: dict[int, Answer] = {}
    many = batch_generate(model, stopping, requests, 12, batch_size=4, done=told.__setitem__)
    assert max(sizes) == 4 and len(set(sizes)) > 1
    assert [a.tokens for a in many] == [batch_generate(model, stopping, [r], 12)[0].tokens for r in requests]
    assert [told[n] for n in range(9)] == many


def test_buffers_are_released(model: Llama3V, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths hardly ever come twice, so what MLX keeps of them would only grow."""
    released: list[int] = []
    monkeypatch.setattr(mx, "clear_cache", lambda: released.append(1))
    monkeypatch.setattr("mlx_llama3v.inference.batch.CLEAR_STEPS", 4)
    requests = [Request((Message("user", f"{n}, " * 5),)) for n in range(4)]
    stopless = tiny_tokens()
    stopless.stop = frozenset()
    batch_generate(model, stopless, requests, 10, batch_size=4)
    assert len(released) == 1 + 9 // 4  # one prefill, nine steps
    released.clear()
    alone = batch_generate(model, stopless, requests[:1], 2, prefill_step_size=5)[0].prompt_tokens
    assert len(released) == -(-alone // 5) > 3
    released.clear()
    answer(Session(model, stopless, memory=Memory(prefill_step_size=5)), "0, " * 5, max_tokens=1)
    assert len(released) == -(-alone // 5) - 1


# --- shared beginnings


def test_place_keys_tell_pictures_apart(model: Llama3V) -> None:
    def keys(*pictures) -> np.ndarray:
        layouts = [p.layout for p in pictures]
        message = Message("user", "What?", tuple(range(len(pictures))))
        return place_keys(
            render([message], layouts, TOKENS, model.config.projector_config, generate=True), pictures, model
        )

    one, same, other = keys(picture(SPLIT, 1)), keys(picture(SPLIT, 1)), keys(picture(SPLIT, 2))
    assert (one == same).all() and 0 < common(one, other) < 12
    assert common(keys(picture(SPLIT, 1), picture(PLAIN, 2)), keys(picture(SPLIT, 1), picture(PLAIN, 3))) > 20


def test_prefixes_share_and_forget(model: Llama3V) -> None:
    cache = model.make_cache()
    model(mx.arange(20)[None], cache)
    prefixes = Prefixes(10**6)
    prefixes.add(np.arange(20), cache)
    length, found = prefixes.find(np.array([*range(12), 99, 98]))
    assert length == 12 and found[0].offset == 12
    before = np.array(prefixes.find(np.arange(20))[1][0].keys)
    model(mx.array([[99, 98]]), found)  # writing into the copy leaves the entry alone
    model(mx.array([[97]]), cache)
    assert (np.array(prefixes.find(np.arange(20))[1][0].keys) == before).all()
    assert prefixes.find(np.arange(20))[0] == 19 and prefixes.find(np.array([5, 6]))[0] == 0
    prefixes.add(np.arange(21), cache)
    assert len(prefixes) == 1  # what an entry continues, it replaces
    prefixes.add(np.arange(5), cache)
    assert len(prefixes) == 1
    tiny = Prefixes(prefixes.nbytes - 1)
    tiny.add(np.arange(21), cache)
    assert len(tiny) == 0 and tiny.nbytes == 0

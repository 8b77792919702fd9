"""The API through OpenAI's own client and through plain HTTP: answers, streams, batches, reuse, disconnects."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_llama3v.inference import Sampling, Session
from tests.serving import MODEL, Served, endless, make_directory, png, question, serving, wait_until

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("served") / MODEL)


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Served]:
    with serving(directory) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def alone(session: Session, text: str, images=(), max_tokens: int = 12, **sampling) -> str:
    session.reset()
    return list(session.ask(text, images, Sampling(max_tokens=max_tokens, **sampling)))[-1].answer.text


def test_an_answer(client, served: Served) -> None:
    found = client.chat.completions.create(model=MODEL, messages=[question("What?", png(1))], max_tokens=12)
    assert found.choices[0].message.content == alone(served.session, "What?", [png(1)])
    assert found.choices[0].message.content != alone(served.session, "What?", [png(2)])  # the picture matters
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 12)
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12 and found.object == "chat.completion"
    assert [m.id for m in client.models.list().data] == [client.models.retrieve(MODEL).id] == [MODEL]


def test_a_stream_is_the_answer_in_pieces(client, served: Served) -> None:
    asked = {"model": MODEL, "messages": [question("Look.", png(3), png(4))], "max_completion_tokens": 15}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 15 and not chunks[-1].choices
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == alone(served.session, "Look.", [png(3), png(4)], 15)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert all(c.usage is None for c in client.chat.completions.create(**asked, stream=True))


def test_turns_and_options(client, served: Served) -> None:
    first, session = "It says stop.", served.session
    messages = [question("What?", png(1)), {"role": "assistant", "content": first}, question("Sure?", png(5))]
    found = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
    session.restore([("What?", [png(1)], first)])
    assert (
        found.choices[0].message.content == list(session.ask("Sure?", [png(5)], Sampling(max_tokens=8)))[-1].answer.text
    )
    brief = [{"role": "system", "content": "Be brief."}, question("What?")]
    told = client.chat.completions.create(model=MODEL, messages=brief, max_tokens=8).choices[0].message.content
    assert told == alone(Session(session.model, session.tokens, system="Be brief."), "What?", max_tokens=8)
    asked = {"model": MODEL, "messages": [question("Hi")], "max_tokens": 12}
    one, same, other = (
        client.chat.completions.create(**asked, temperature=1.5, top_p=0.9, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    )
    assert one == same != other
    assert one == alone(served.session, "Hi", temp=1.5, top_p=0.9, seed=1)
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stop = whole[3:6]
    cut = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_json_schema(client) -> None:
    pytest.importorskip("llguidance")
    properties = {"colour": {"enum": ["red", "green"]}, "big": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["colour", "big"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    asked = {"model": MODEL, "messages": [question("What?", png(1))], "max_tokens": 200}
    found = client.chat.completions.create(**asked, response_format=wanted, temperature=1.0, seed=4).choices[0]
    values = json.loads(found.message.content)
    assert values["colour"] in ("red", "green") and isinstance(values["big"], bool) and found.finish_reason == "stop"
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        client.chat.completions.create(**asked, response_format=bad)


def test_many_at_once_equal_one_by_one(client, served: Served) -> None:
    asked = [(f"Question {n}?", [png(n % 3)] * (n % 2), 5 + n % 9) for n in range(16)]
    expected = [alone(served.session, *question_) for question_ in asked]
    assert len(set(expected)) > 8

    def ask(item) -> str:
        text, images, most = item
        messages = [question(text, *images)]
        return (
            client.chat.completions.create(model=MODEL, messages=messages, max_tokens=most).choices[0].message.content
        )

    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            assert list(pool.map(ask, asked)) == expected
    assert "llama3v_running" in httpx.get(f"{served.url}/metrics").text


def test_a_shared_beginning_is_not_prefilled_again(client) -> None:
    messages = [question("A question about this one", png(42, (200, 100)))]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6)
    assert first.usage.prompt_tokens_details.cached_tokens < 8
    again = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.choices[0].message.content == first.choices[0].message.content
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, question("And?")]
    turn = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6)
    assert turn.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
    other = [question("A question about this one", png(43, (200, 100)))]
    changed = client.chat.completions.create(model=MODEL, messages=other, max_tokens=6)
    assert changed.usage.prompt_tokens_details.cached_tokens < 10


def test_the_prefix_memory_is_bounded(directory: Path) -> None:
    with serving(directory, prefix_memory=200_000) as small:
        for n in range(12):
            body = {"messages": [question(f"{n} " * 60)], "max_tokens": 2}
            assert httpx.post(f"{small.url}/v1/chat/completions", json=body).status_code == 200
            assert small.worker._prefixes.nbytes <= 200_000
        assert 0 < len(small.worker._prefixes) < 12


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(directory: Path, stream: bool) -> None:
    with serving(directory, max_batch=1, max_queue=0) as one, endless(one):
        body = {"messages": [question("Go on")], "max_tokens": 3900, "stream": stream, "temperature": 2, "seed": 1}
        leaving = threading.Event()

        def read() -> None:
            try:
                with httpx.stream(
                    "POST", f"{one.url}/v1/chat/completions", json=body, timeout=None if stream else 0.7
                ) as r:
                    for _ in r.iter_lines():
                        if leaving.is_set():
                            return
            except httpx.TimeoutException:
                pass

        thread = threading.Thread(target=read)
        thread.start()
        assert wait_until(lambda: one.worker.load == 1)
        if stream:
            busy = httpx.post(f"{one.url}/v1/chat/completions", json={**body, "max_tokens": 1, "stream": False})
            assert busy.status_code == 429 and busy.json()["error"]["code"] == "queue_full"
        leaving.set()
        thread.join(5)
        assert wait_until(lambda: one.worker.load == 0, 2.0)
        assert "cancelled_total" in httpx.get(f"{one.url}/metrics").text


def test_a_broken_decoder_is_a_500_and_not_the_end(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(directory) as broken:
        body = {"messages": [question("Hello")], "max_tokens": 4}
        with monkeypatch.context() as patch:
            patch.setattr("mlx_llama3v.inference.batch.Running.step", lambda self: 1 / 0)
            failed = httpx.post(f"{broken.url}/v1/chat/completions", json=body, timeout=20)
        assert failed.status_code == 500 and "division" not in failed.text
        assert httpx.post(f"{broken.url}/v1/chat/completions", json=body, timeout=20).status_code == 200

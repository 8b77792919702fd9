"""The server is closed by default, every limit holds, and what clients do wrong is said in OpenAI's shape."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlx_llama3v.errors import RunError
from mlx_llama3v.model import Llama3V
from mlx_llama3v.server.config import ServeConfig
from mlx_llama3v.server.openapi import _CHAT
from mlx_llama3v.server.schema import FIELDS
from tests.serving import (
    MODEL,
    Served,
    asked,
    data_uri,
    endless,
    make_directory,
    png,
    post,
    question,
    serving,
    wait_until,
)

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("served") / MODEL)


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Served]:
    with serving(directory, max_body=200_000, max_pixels=500_000, max_images=3, server_max_tokens=50) as running:
        yield running


def refused(response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"].endswith("_error")
    for word in words:
        assert word in error["message"], error


def test_unknown_and_unsupported_fields(served: Served) -> None:
    assert post(served, asked(user="me", n=1, frequency_penalty=0, logprobs=None, seed=-5)).status_code == 200
    nothing = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "logit_bias": {}, "top_logprobs": 0}
    nothing |= {"store": False, "metadata": {}, "modalities": ["text"], "service_tier": "auto"}
    assert post(served, asked(**nothing)).status_code == 200  # as client libraries send them
    assert set(_CHAT["properties"]) | {"model"} == set(FIELDS)  # our own description knows them all
    for field, value in {
        "tools": [{"type": "function"}], "logit_bias": {"1": 1}, "store": True, "top_logprobs": 2,
        "n": 2, "logprobs": True, "wrong": 1, "temperature": 3, "top_p": 0, "max_tokens": True,
        "stop": [""], "stream": "yes", "seed": 2**70, "response_format": {"type": "xml"}, "messages": {},
        "frequency_penalty": 1, "stream_options": {"include_usage": True},
    }.items():  # fmt: skip
        response = post(served, {**asked(), field: value})
        refused(response, 400, field.split(".")[0])
        assert response.json()["error"]["param"] == field
    refused(post(served, asked(model="gpt-9")), 404, "gpt-9")
    refused(post(served, {"messages": [{"role": "assistant", "content": "x"}]}), 400, "last message")
    half = json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode()
    headers = {"content-type": "application/json"}
    refused(httpx.post(f"{served.url}/v1/chat/completions", content=half, headers=headers), 400, "content.0")
    refused(httpx.get(f"{served.url}/v1/nothing"), 404)
    refused(httpx.get(f"{served.url}/v1/chat/completions"), 405)
    refused(httpx.get(f"{served.url}/page/..%2fapp.py"), 404)


def test_limits_of_a_request(served: Served) -> None:
    refused(post(served, asked(data_uri(b"x" * 200_000))), 413, "200000 bytes")
    refused(post(served, asked(png(0, (1000, 600)))), 400, "1000 x 600")
    refused(post(served, asked(*[png()] * 4)), 400, "4 pictures")
    refused(post(served, asked(max_tokens=51)), 400, "limit is 50")
    refused(post(served, {"messages": [question("long " * 5000)]}), 400, "context holds 4000")

    def chunks() -> Iterator[bytes]:  # no Content-Length to believe
        for _ in range(100):
            yield b" " * 10_000

    url, headers = f"{served.url}/v1/chat/completions", {"content-type": "application/json"}
    refused(httpx.post(url, content=chunks(), headers=headers), 413)


def test_the_context_limit_is_an_option(directory: Path) -> None:
    with serving(directory, max_context=40) as small, endless(small):
        refused(post(small, {"messages": [question("long " * 30)]}), 400, "context holds 40")
        answer = post(small, {"messages": [question("Go")], "temperature": 2, "seed": 1}).json()
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 40


def test_a_prompt_is_processed_in_steps(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    hidden = Llama3V.hidden
    with serving(directory, prefill_step_size=8) as running:
        monkeypatch.setattr(Llama3V, "hidden", lambda *a, **k: lengths.append(a[1].size) or hidden(*a, **k))
        assert post(running, {"messages": [question("long " * 30)], "max_tokens": 1}).status_code == 200
    assert max(lengths) == 8 and len(lengths) > 4


def test_time_is_limited(directory: Path) -> None:
    with serving(directory, timeout=0.4) as quick, endless(quick):
        refused(post(quick, {"messages": [question("Go")], "max_tokens": 3900, "temperature": 2, "seed": 1}), 504)
        assert wait_until(lambda: quick.worker.load == 0)
        refused(_slow_body(quick.url), 408)


def _slow_body(url: str):
    def dribble() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.8)
        yield b"}"

    return httpx.post(f"{url}/v1/chat/completions", content=dribble(), headers={"content-type": "application/json"})


def test_the_queue_is_limited(directory: Path) -> None:
    with serving(directory, max_batch=1, max_queue=2) as busy:
        body = {"messages": [question("Go")], "max_tokens": 300, "temperature": 2, "seed": 1}
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda _: post(busy, body), range(12)))
        codes = [response.status_code for response in found]
        assert set(codes) == {200, 429} and codes.count(200) >= 3
        late = next(response for response in found if response.status_code == 429)
        refused(late, 429, "wait")
        assert late.headers["retry-after"]


def test_a_body_on_its_way_has_a_place_in_the_queue(directory: Path) -> None:
    with serving(directory, max_batch=1, max_queue=1) as busy:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow = [socket.create_connection(("127.0.0.1", int(busy.url.rpartition(":")[2]))) for _ in range(2)]
        for connection in slow:
            connection.sendall(head + b'Content-Length: 1000\r\n\r\n{"messages"')
        assert wait_until(lambda: post(busy, asked()).status_code == 429)
        for connection in slow:
            connection.close()
        assert wait_until(lambda: post(busy, asked()).status_code == 200)


def test_slices_are_limited(directory: Path) -> None:
    with serving(directory) as running:
        running.worker.encoder.tiling = type(running.worker.encoder.tiling)("uhd", 0)
        found = httpx.post(f"{running.url}/page/slices", json={"image": data_uri(png(0, (400, 300)))}).json()
        assert (found["slices"], found["rows"]) == (1, 0)
        assert post(running, asked(png(0, (400, 300)))).json()["llama3v"]["slices"] == 1


def test_low_detail_is_the_overview_alone(served: Served) -> None:
    def shown(*details: str | None) -> tuple[int, str]:
        body = asked(*[png(0, (400, 300))] * len(details), max_tokens=12)
        for part, detail in zip(body["messages"][0]["content"], details, strict=False):
            part["image_url"]["detail"] = detail
        found = post(served, body).json()
        return found["llama3v"]["slices"], found["choices"][0]["message"]["content"]

    high = shown("high")
    low = shown("low")
    assert high[0] > low[0] == 1 and high[1] != low[1]
    assert shown(None) == shown("auto") == high and shown("low") == low
    assert shown("low", "high")[0] == 1 + high[0]


def test_closed_by_default(served: Served) -> None:
    assert (ServeConfig().host, ServeConfig().api_key, ServeConfig().cors_origin) == ("127.0.0.1", None, ())
    for host in ("evil.example", "192.168.0.4:80"):  # another name for this address: DNS rebinding
        refused(post(served, asked(), headers={"Host": host}), 403)
    assert httpx.get(f"{served.url}/health", headers={"Host": "localhost:1"}).status_code == 200
    url, text = f"{served.url}/v1/chat/completions", json.dumps(asked())
    refused(httpx.post(url, content=text, headers={"content-type": "text/plain"}), 415)  # what a form can send
    answer = httpx.options(url, headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"})
    assert "access-control-allow-origin" not in answer.headers
    with pytest.raises(RunError, match="max_batch is 0"):
        ServeConfig(max_batch=0)
    with pytest.raises(RunError, match="port is 99999; expected 0 to 65535"):
        ServeConfig(port=99999)


def test_key_and_origin(directory: Path) -> None:
    with serving(directory, api_key="secret", cors_origin=("https://a.example",)) as locked:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sécret"}):
            headers = {name: value.encode() for name, value in headers.items()}
            refused(post(locked, asked(), headers=headers), 401)
            refused(httpx.get(f"{locked.url}/metrics", headers=headers), 401)
        assert post(locked, asked(), headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{locked.url}/health").status_code == 200
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            answer = httpx.get(f"{locked.url}/health", headers={"Origin": origin})
            assert ("access-control-allow-origin" in answer.headers) == allowed


# --- pictures from elsewhere


class Shop(BaseHTTPRequestHandler):
    """A web server with a picture, redirects and a flood; notes who asked."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Shop.seen.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow":
            for _ in range(20):  # never silent for long, never done
                self.wfile.write(b"x")
                time.sleep(0.1)
            return
        self.wfile.write(png(1) if self.path == "/a.png" else b"x" * 1_000_000)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def shop() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_nothing_is_fetched_or_read_unasked(served: Served, shop: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    Shop.seen.clear()
    for url in (
        f"http://{shop}/a.png", f"https://{shop}/a.png", f"ftp://{shop}/a.png", f"file://{tmp_path}/a.png",
        f"{tmp_path}/a.png", "data:text/html;base64,aGk=", "data:image/svg+xml;base64,aGk=", "data:image/png,xx",
        "data:image/png;base64,####", "", "javascript:alert(1)", "gopher://x", "DATA:image/png;base64",
    ):  # fmt: skip
        assert post(served, asked(url)).status_code == 400, url
    assert not Shop.seen


def test_a_host_that_was_opened(directory: Path, shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(directory, allow_image_host=("127.0.0.1", "shop.example"), max_body=100_000) as opened:
        same = post(opened, asked(png(1))).json()["choices"][0]["message"]["content"]
        for url in (f"http://{shop}/a.png", f"http://{shop}/to//a.png"):
            assert post(opened, asked(url)).json()["choices"][0]["message"]["content"] == same
        refused(post(opened, asked(f"http://{shop}/flood")), 413)
        Shop.seen.clear()
        port = shop.partition(":")[2]
        for url in (f"http://{shop}/to/http://localhost:{port}/a.png", f"http://{shop}/to/file:///etc/passwd"):
            refused(post(opened, asked(url)), 400, "fetched from there")
        refused(post(opened, asked(f"http://{shop}/to//to//to//to//to//a.png")), 400, "redirects")
        refused(post(opened, asked(f"http://user@{shop}/a.png")), 400)
        # A name that was opened, but stands for an address in the local network.
        resolve = socket.getaddrinfo
        monkeypatch.setattr(
            "mlx_llama3v.server.pictures.socket.getaddrinfo",
            lambda host, *args, **more: resolve("127.0.0.1" if host == "shop.example" else host, *args, **more),
        )
        refused(post(opened, asked(f"http://shop.example:{port}/a.png")), 400, "local network")
        assert "/a.png" not in Shop.seen


def test_a_host_that_is_slow(directory: Path, shop: str) -> None:
    with serving(directory, allow_image_host=("127.0.0.1",), image_seconds=0.5) as opened:
        started = time.monotonic()
        refused(post(opened, asked(f"http://{shop}/slow")), 400, "too slowly")
        assert time.monotonic() - started < 1.9  # it would take two seconds in all


def test_a_folder_that_was_opened(directory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a b.png").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(1))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    with serving(directory, image_dir=folder) as opened:
        assert post(opened, asked(f"file://{folder}/a%20b.png")).status_code == 200
        for path in (
            "secret.png",
            "pictures/link.png",
            "pictures/../secret.png",
            "pictures/pipe.png",
            "pictures",
            "none",
        ):
            refused(post(opened, asked(f"file://{tmp_path}/{path}")), 400, "no such picture")
        refused(post(opened, asked("file:///etc/passwd")), 400)
        refused(post(opened, asked(f"file://evil.example{folder}/a%20b.png")), 400)
        refused(post(opened, asked("file:///%00")), 400)

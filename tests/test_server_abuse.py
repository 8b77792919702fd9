"""Load and abuse: many clients, requests that no client should send, and the end of the process.

Short here; `LLAMA3V_ABUSE=2000 LLAMA3V_LOAD_SECONDS=60 pytest tests/test_server_abuse.py -s` is the long form.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ENDLESS_CLI, MODEL, asked, data_uri, make_directory, png, post, serving, wait_until

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
REQUESTS = int(os.environ.get("LLAMA3V_ABUSE", "300"))
SECONDS = float(os.environ.get("LLAMA3V_LOAD_SECONDS", "1.5"))
REFUSED = {400, 401, 404, 405, 413, 415}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("abused") / MODEL)


def _abuse(count: int) -> Iterator[bytes]:
    """Requests that no client should send: mutated fields, cut bodies, deep and wide JSON, broken pictures."""
    chance = random.Random(0)
    odd: list[Any] = [None, True, -1, 1e308, "", "x" * 500, [], {}, [[]], {"a": {}}, "\ud800", 10**400, [None] * 50]
    whole = json.dumps(asked(png(1)))
    bomb = png(0, (700, 700))
    broken = [bomb, bomb[:200], b"", b"GIF89a", b"\xff\xd8\xff\xe0", b"%PDF-1.4", b"\x00" * 1000, png(2)[:-30]]
    yield b"[" * 100_000
    yield b'{"messages": ' + b'{"a":' * 50_000
    yield b"\xff\xfe{"
    yield b'{"messages": NaN}'
    for _ in range(count - 4):
        kind = chance.randrange(5)
        body: Any = asked(png(1))
        if kind == 0:
            yield whole[: chance.randrange(len(whole))].encode()
            continue
        if kind == 1:
            body[chance.choice([*body, "model", "stop", "stream", "seed", "temperature", "tools", "top_k"])] = (
                chance.choice(odd)
            )
        elif kind == 2:
            body["messages"][0][chance.choice(["role", "content", "name", "x"])] = chance.choice(odd)
        elif kind == 3:
            part = chance.choice(body["messages"][0]["content"])
            part[chance.choice([*part, "x"])] = chance.choice(odd)
        else:
            mime = chance.choice(["image/png", "image/jpeg", "image/webp", "text/html", "image/x"])
            body["messages"][0]["content"][0]["image_url"]["url"] = data_uri(chance.choice(broken), mime)
        yield json.dumps(body).encode()


def test_malformed_requests(directory: Path) -> None:
    with serving(directory, max_body=200_000, max_pixels=400_000, max_queue=1000) as hard:
        post(hard, asked(png(1)))
        before, statuses = _resident(), Counter[int]()
        with httpx.Client(timeout=20) as client:
            url, headers = f"{hard.url}/v1/chat/completions", {"content-type": "application/json"}
            for body in _abuse(REQUESTS):
                response = client.post(url, content=body, headers=headers)
                assert response.status_code in {200, *REFUSED}, (body[:300], response.text)
                statuses[response.status_code] += 1
                assert response.status_code == 200 or set(response.json()) == {"error"}
        assert statuses[400] > REQUESTS // 2
        assert wait_until(lambda: hard.worker.load == 0) and post(hard, asked(png(1))).status_code == 200
        grown = _resident() - before
        print(f"\n{REQUESTS} malformed requests, by status {dict(statuses)}; memory grew by {grown / 1e6:.0f} MB")
        assert grown < 150_000_000


def test_requests_made_from_our_own_description(directory: Path) -> None:
    """What schemathesis makes of /openapi.json, valid and not, gets an answer or OpenAI's error and never a 500."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    each = max(REQUESTS // 40, 5)  # two modes of five routes, most of them for chat
    statuses: Counter[int] = Counter()
    with serving(directory, max_body=200_000, max_pixels=400_000, server_max_tokens=8) as hard:
        schema = schemathesis.openapi.from_url(f"{hard.url}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in schemathesis.GenerationMode:
                if mode == schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                    continue  # they take nothing that could be wrong
                chat = operation.path == "/v1/chat/completions"

                @settings(
                    max_examples=each * 8 if chat else each, database=None, derandomize=True, deadline=None,
                    suppress_health_check=list(HealthCheck), phases=[Phase.generate],
                )  # fmt: skip
                @given(case=operation.as_strategy(generation_mode=mode))
                def run(case: Any) -> None:
                    response = case.call(base_url=hard.url, timeout=20)
                    statuses[response.status_code] += 1
                    assert response.status_code in {200, *REFUSED}, (case.body, response.text)
                    assert response.status_code == 200 or set(response.json()) == {"error"}

                run()
        assert wait_until(lambda: hard.worker.load == 0) and post(hard, asked(png(1))).status_code == 200
    print(f"\nschemathesis: {sum(statuses.values())} requests, by status {dict(statuses)}")
    assert statuses[200] and statuses[400] > each


def _resident() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) * 1024 if status.exists() else 0


def test_sixteen_clients(directory: Path) -> None:
    with serving(directory) as loaded:
        bodies = [asked(*[png(n % 5)] * (n % 3), max_tokens=4 + n) for n in range(16)]
        expected = [post(loaded, body).json()["choices"] for body in bodies]
        ends, asked_in_all = time.monotonic() + SECONDS, []

        def client(n: int) -> None:
            chance = random.Random(n)
            with httpx.Client(timeout=30) as http:
                while time.monotonic() < ends:
                    which = chance.randrange(16)
                    found = http.post(f"{loaded.url}/v1/chat/completions", json=bodies[which]).json()
                    assert found["choices"] == expected[which]
                    asked_in_all.append(which)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(client, range(16)))
        print(f"\n16 clients, {SECONDS:.1f} s: {len(asked_in_all)} answers, all equal to those of one client alone")
        assert len(asked_in_all) > 16 and loaded.worker.load == 0


def test_sigterm_finishes_running_answers(directory: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [sys.executable, "-c", ENDLESS_CLI, "serve", "--model", str(directory), "--port", str(port)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"

        def up() -> bool:
            try:
                return httpx.get(f"{url}/health").status_code == 200
            except httpx.HTTPError:
                return False

        assert wait_until(lambda: up() or process.poll() is not None, 60)
        assert process.poll() is None, process.stderr.read()
        body = {**asked(), "max_tokens": 250, "temperature": 2, "seed": 1, "stream": True}
        whole = [_said(line) for line in _lines(url, body)]
        found = []
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if not found:
                    process.send_signal(signal.SIGTERM)
                found += [_said(line)] if line else []
        assert found == whole and len(whole) > 40
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def _lines(url: str, body: dict[str, Any]) -> list[str]:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        return [line for line in response.iter_lines() if line]


def _said(line: str) -> Any:
    return line if line == "data: [DONE]" else json.loads(line[6:])["choices"][0]["delta"]

"""Who may ask, and how much a request may bring: host name, key, type, size and time."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from mlx_llama3v.server.config import ServeConfig
from mlx_llama3v.server.schema import Refusal, parse_json


class Gate:
    """Every request passes it; a refusal is raised as `Refusal`."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config

    def admit(self, request: Request, *, key: bool = True) -> None:
        """Raises Refusal for a foreign host name (another site's name for this address) or a wrong key."""
        config = self._config
        if _is_local(config.host) and not _is_local(_name(request.headers.get("host", ""))):
            raise Refusal("this server answers on this machine's own names only.", status=403)
        if key and config.api_key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, config.api_key.encode()):
                raise Refusal("the API key is missing or wrong.", status=401, code="invalid_api_key")

    async def read_json(self, request: Request) -> dict[str, Any]:
        """The body, within its limits. Another site's form cannot send this type unasked."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal("the request's Content-Type is not application/json.", status=415)
        body = bytearray()

        async def collect() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > self._config.max_body:
                    raise Refusal(f"the request is larger than {self._config.max_body} bytes.", status=413)

        try:
            await asyncio.wait_for(collect(), self._config.timeout)
        except TimeoutError:
            raise Refusal("the request did not arrive in time.", status=408) from None
        except ClientDisconnect:
            raise Refusal("the client left.", status=499) from None
        return parse_json(bytes(body))


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    return host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]


def _is_local(name: str) -> bool:
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

"""The sockets of the server, open before the model is loaded: a port that is taken is told at once.

Whoever connects before the model is there waits for it.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mlx_llama3v.errors import RunError

_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # localhost has an IPv6 address also where IPv6 is off


@contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets that listen on every address of `host`, all on one port. Raises RunError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RunError(f"{host!r} stands for no address; expected one of this machine (--host).") from error
    absent: OSError | None = None
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, kind, protocol, _, address in dict.fromkeys(found):
            at = sockets[0].getsockname()[1] if sockets else port  # of port 0 the first one chooses
            try:
                made = opened.enter_context(socket.socket(family, kind, protocol))
                _open(made, (address[0], at, *address[2:]))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise RunError(_sentence(host, at, error)) from error
                absent = error
                continue
            sockets.append(made)
        if absent and not sockets:
            raise RunError(_sentence(host, port, absent)) from absent
        yield sockets


def _open(made: socket.socket, address: tuple[object, ...]) -> None:
    """As asyncio does it, and listening, so that nobody else takes the port meanwhile."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else it is taken for a minute after a restart
    if made.family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind(address)
    made.listen(2048)


def _sentence(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use; choose another with --port."
    if error.errno == errno.EACCES:
        return f"port {port} is not open to you; choose one above 1023 with --port."
    return f"{host} port {port} cannot be listened on: {error.strerror}; choose others with --host and --port."


def url(host: str, port: int) -> str:
    """http://host:port, an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

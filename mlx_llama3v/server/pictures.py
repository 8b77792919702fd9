"""Where the pictures of a request come from: the request itself; a host or a folder only where it was opened."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import socket
from collections.abc import Iterable
from pathlib import Path
from time import monotonic
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from mlx_llama3v.server.config import ServeConfig
from mlx_llama3v.server.schema import Refusal

MIME = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif", "image/bmp", "image/tiff", "image/avif")
# What files of these types begin with. Pillow knows more, and starts another program for some of those.
STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
REDIRECTS = 3


def read_picture(url: str, config: ServeConfig) -> bytes:
    """The bytes behind an image URL. Blocks: call it in a thread. Raises Refusal."""
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        content = _data(url, config.max_body)
    elif scheme == "file" and config.image_dir is not None:
        content = _file(url, config.image_dir, config.max_body)
    elif scheme in ("http", "https") and config.allow_image_host:
        content = _fetch(url, config)
    else:
        message = "a picture must be a data URI (data:image/png;base64,...)."
        raise Refusal(message, "image_url", code="invalid_image_url")
    if not content.startswith(STARTS) and content[4:8] != b"ftyp":  # of AVIF
        kinds = ", ".join(mime.removeprefix("image/") for mime in MIME)
        raise Refusal(f"a picture's content is none of {kinds}.", "image_url")
    return content


def _data(url: str, limit: int) -> bytes:
    head, comma, payload = url.partition(",")
    mime, _, encoding = head[5:].partition(";")
    if not comma or mime.lower() not in MIME or encoding.lower() != "base64":
        raise Refusal(f"a data URI must begin data:TYPE;base64, with TYPE one of {', '.join(MIME)}.", "image_url")
    if len(payload) * 3 // 4 > limit:
        raise Refusal(f"a picture is larger than {limit} bytes.", "image_url", 413)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal("a data URI holds no valid base64.", "image_url") from error


def _file(url: str, folder: Path, limit: int) -> bytes:
    """A regular file whose real path lies in the folder; links out of it do not count."""
    refusal = Refusal("there is no such picture in the server's folder.", "image_url")
    try:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise refusal
        path, root = (folder / unquote(parts.path)).resolve(), folder.resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise refusal
        if path.stat().st_size > limit:
            raise Refusal(f"a picture is larger than {limit} bytes.", "image_url", 413)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise refusal from error


def _fetch(url: str, config: ServeConfig) -> bytes:
    """GET from an allowed host, every redirect checked like the first address."""
    import httpx

    ends = monotonic() + config.image_seconds
    try:
        with httpx.Client(trust_env=False, timeout=config.image_seconds / 2, follow_redirects=False) as client:
            for _ in range(REDIRECTS + 1):
                parts, address = _checked(url, config.allow_image_host)
                host = str(parts.hostname)
                netloc = f"[{address}]" if ":" in address else address
                port = f":{parts.port}" if parts.port else ""
                # The checked address is the one that is asked: a name could resolve to another one by then.
                there = parts._replace(netloc=netloc + port, fragment="").geturl()
                # Nothing is unpacked on the way: a small body could become a huge one before it is counted.
                headers, sni = {"Host": host + port, "Accept-Encoding": "identity"}, {"sni_hostname": host}
                with client.stream("GET", there, headers=headers, extensions=sni) as response:
                    if response.is_redirect:
                        url = urljoin(url, response.headers.get("location", ""))
                        continue
                    if response.status_code != 200:
                        raise Refusal(f"the picture's host answered {response.status_code}.", "image_url")
                    return _limited(response.iter_raw(), config.max_body, ends)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise Refusal("the picture could not be fetched from its host.", "image_url") from error
    raise Refusal("the picture's host redirects too often.", "image_url")


def _limited(chunks: Iterable[bytes], limit: int, ends: float) -> bytes:
    found = bytearray()
    for chunk in chunks:
        found += chunk
        if len(found) > limit:
            raise Refusal(f"a picture is larger than {limit} bytes.", "image_url", 413)
        if monotonic() > ends:
            raise Refusal("the picture's host sends it too slowly.", "image_url")
    return bytes(found)


def _checked(url: str, allowed: tuple[str, ...]) -> tuple[SplitResult, str]:
    """The parts of a URL on an allowed host, and the address that it stands for."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if parts.scheme not in ("http", "https") or host not in allowed or parts.username is not None:
        raise Refusal("pictures may not be fetched from there.", "image_url", code="invalid_image_url")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    # An address that the operator spelled out is meant; a name must not lead into the local network.
    if any(address != host and not ipaddress.ip_address(address.partition("%")[0]).is_global for address in found):
        raise Refusal("the picture's host lies in a local network.", "image_url", code="invalid_image_url")
    return parts, found[0]

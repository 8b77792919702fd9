"""What the server may do and take; each limit is a field here and an option of `serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_llama3v.errors import RunError
from mlx_llama3v.knob import knob


@dataclass(frozen=True)
class ServeConfig:
    """Closed by default: this machine only, no other web page, pictures only from the request itself."""

    host: str = knob("127.0.0.1", "Address to listen on; 0.0.0.0 opens it to the network (then set --api-key).")
    port: int = knob(8080, "Port to listen on.")
    api_key: str | None = knob(None, "Clients must send it as a bearer token (also LLAMA3V_API_KEY).")
    cors_origin: tuple[str, ...] = knob((), "Web origin that may call the API; repeat for more.")
    allow_image_host: tuple[str, ...] = knob((), "Host that pictures may be fetched from; repeat for more.")
    image_dir: Path | None = knob(None, "Folder that file:// pictures may be read from.")  # noqa: RUF009
    image_seconds: float = knob(15.0, "Seconds that fetching a picture from such a host may take.")
    max_body: int = knob(32_000_000, "Largest request, and largest picture, in bytes.")
    max_pixels: int = knob(50_000_000, "Largest picture.")
    max_images: int = knob(16, "Pictures in a request.")
    server_max_tokens: int = knob(4096, "Longest answer that a request may ask for.")
    max_context: int | None = knob(None, "Longest conversation in tokens [default: the model's].")
    max_batch: int = knob(16, "Answers decoded side by side.")
    max_queue: int = knob(64, "Requests that wait beside those; more get a 429.")
    timeout: float = knob(600.0, "Seconds that a request may take in all.")
    prefix_memory: int = knob(1_000_000_000, "Bytes of keys and values kept for requests that begin alike.")
    prefill_step_size: int = knob(512, "Prompt tokens that are processed between two steps of the others.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "cors_origin", tuple(self.cors_origin))
        object.__setattr__(self, "allow_image_host", tuple(name.lower() for name in self.allow_image_host))
        least = ("max_body", "max_pixels", "max_images", "server_max_tokens", "max_batch", "prefill_step_size")
        for name in least:
            if getattr(self, name) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.max_queue < 0 or self.prefix_memory < 0 or self.timeout <= 0 or self.image_seconds <= 0:
            raise RunError("max_queue and prefix_memory must not be negative, timeout and image_seconds above 0.")
        if not 0 <= self.port <= 65535:
            raise RunError(f"port is {self.port}; expected 0 to 65535.")
        if self.image_dir is not None and not Path(self.image_dir).is_dir():
            raise RunError(f"{self.image_dir} is no folder; expected one with pictures (--image-dir).")
        if self.api_key == "":
            raise RunError("the API key is empty; expected some text.")

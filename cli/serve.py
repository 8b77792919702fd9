"""`llama3v-mlx serve`: an OpenAI-compatible API, and a page to chat on."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import (
    Config,
    MaxSlices,
    Model,
    Offline,
    Run,
    open_session,
    settings_options,
    split_settings,
)
from mlx_llama3v.errors import RunError
from mlx_llama3v.server.config import ServeConfig


def register(app: typer.Typer) -> None:
    app.command()(serve)


@settings_options(ServeConfig)
def serve(
    model: Model,
    run: Run = None,
    max_slices: MaxSlices = None,
    offline: Offline = False,
    config: Config = None,
    **settings: Any,
) -> None:
    """Serve a model to OpenAI clients (http://127.0.0.1:8080/v1) and on a page (http://127.0.0.1:8080/).

    Example: `llama3v-mlx serve --model my-model --run runs/sft`, then open the printed address in a browser.

    Nothing is open that was not asked for: this machine only, pictures only from the request itself.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise RunError(
            'serve needs FastAPI and uvicorn; install them with: pip install "mlx-llama3v[serve]".'
        ) from error
    from mlx_llama3v.server.app import make_app
    from mlx_llama3v.server.listen import listening, url
    from mlx_llama3v.server.worker import Worker

    (limits,) = split_settings(settings, ServeConfig)
    if limits.api_key is None and (key := os.environ.get("LLAMA3V_API_KEY")):
        limits = replace(limits, api_key=key)
    with listening(limits.host, limits.port) as sockets:
        port = sockets[0].getsockname()[1]
        address = url(limits.host, port)
        if limits.host not in ("127.0.0.1", "localhost", "::1") and limits.api_key is None:
            show.err.print(f"warning: everyone who reaches {address} may use this; set --api-key.")
        session = open_session(model, run, None, max_slices, offline)
        name = Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model
        app = make_app(Worker(session, limits), limits, name)
        show.out.print(f"Serving {name}: page {address}/, API {address}/v1")
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                timeout_graceful_shutdown=int(limits.timeout),
                timeout_keep_alive=5,
                server_header=False,
            )
        )
        # SIGTERM and Ctrl-C: no new connections, running answers end, then the process does.
        with suppress(KeyboardInterrupt):
            server.run(sockets=sockets)
        if not server.started:
            raise typer.Exit(1)

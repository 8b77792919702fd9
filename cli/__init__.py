"""`llama3v-mlx`: one file a command, each: parse, build a config, make one library call, show the result."""


def main() -> None:
    """Entry point of the `llama3v-mlx` executable."""
    from mlx_llama3v.platform import without_torch

    without_torch()
    from mlx_llama3v.cli.app import run

    run()

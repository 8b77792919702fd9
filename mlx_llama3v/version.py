"""The version, in one place: read by packaging and by `llama3v-mlx --version`."""

__version__ = "0.1.0"

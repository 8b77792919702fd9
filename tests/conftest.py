"""Shared by all tests: the BLAS is loaded before mlx.core, and nothing reaches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import mlx_llama3v  # noqa: F401

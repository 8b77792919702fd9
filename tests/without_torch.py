"""Imported first in processes that compute with MLX alone: PyTorch's import is most of their start."""

from mlx_llama3v.platform import without_torch

without_torch()

"""Converters between Hugging Face checkpoints and model directories, and the bundled tiny bases (`tiny/`)."""

from pathlib import Path

TINY = Path(__file__).parent / "tiny"

"""Where the real-world test files lie: a folder beside the repository that not every machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

KIT = Path(__file__).resolve().parents[2] / "shared" / "kit"
needs_kit = pytest.mark.skipif(not (KIT / "MANIFEST.json").is_file(), reason=f"{KIT} is not on this machine")

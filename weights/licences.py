"""Under which licence the weights that a model is made of stand: read from their README, else known by their name."""

from __future__ import annotations

import re
from pathlib import Path

# Names on the Hub -> the Hub's name of the licence. Only what their owners publish; copies are read from their README.
_KNOWN = (
    (r"google/siglip", "apache-2.0"),
    (r"meta-llama/(?:Meta-)?Llama-3\.2", "llama3.2"),
    (r"meta-llama/(?:Meta-)?Llama-3\.1", "llama3.1"),
    (r"meta-llama/(?:Meta-)?Llama-3-", "llama3"),
)
UNKNOWN = "unknown"


def licence_of(name: str, directory: Path | None = None) -> str:
    """The licence of a checkpoint (a Hub id, or a folder's name) as the Hub spells it; UNKNOWN where nothing says."""
    readme = directory / "README.md" if directory is not None else None
    if readme is not None and readme.is_file():
        head = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        fields = dict(re.findall(r"^(license(?:_name)?):\s*[\"']?([\w.+-]+)", head[1], re.MULTILINE) if head else ())
        licence = fields.get("license", "")
        if licence and licence != "other":
            return licence
        if "license_name" in fields:
            return fields["license_name"]
    return next((licence for pattern, licence in _KNOWN if re.match(pattern, name)), UNKNOWN)

"""What may import what, read from the syntax trees: lazy imports inside functions count like any other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mlx_llama3v"

# Left may not import right; names in one group may import each other unless they are set APART.
ORDER = (
    ("errors", "version", "knob", "platform", "layout", "source", "config", "lanes", "kernels", "durable"),
    ("tensors", "directory"),
    ("hub",),
    ("vision", "text"),
    ("embeddings",),
    ("compat",),
    ("projector", "resampler"),
    ("projected",),
    ("model",),
    ("checkpoint",),
    ("data", "score", "encoder", "plan"),
    ("train", "inference"),
    ("ahead", "estimate"),
    ("server",),
    ("stages", "storing"),
    ("weights",),
    ("demo",),
    ("cli",),
)
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}
APART = ("vision", "text"), ("train", "vision"), ("data", "vision"), ("train", "inference"), ("data", "score")
NEVER = {pair for a, b in APART for pair in ((a, b), (b, a))}
# Third-party modules that only these files may import.
ONLY_IN = {
    "mlx_lm": ("compat.py",),
    "torch": ("demo/bases*.py",),
    "datasets": (),
    "pyarrow": ("data/hf.py",),
    "gguf": ("weights/gguf_file.py",),
}
MAY_PRINT = ("demo/bases*.py", "cli/*.py")  # programs of their own, not library code


def sources() -> dict[str, Path]:
    """Files of the installed package by their path in it; `cli` and `weights` lie beside it here."""
    found = {}
    for folder, prefix in ((PACKAGE, ""), ("cli", "cli/"), ("weights", "weights/")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[prefix + path.relative_to(ROOT / folder).as_posix()] = path
    return found


def imports(tree: ast.AST, where: str) -> Iterator[str]:
    """Dotted names of all that a file imports, relative ones resolved."""
    package = [PACKAGE, *where.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            yield from (str(value.value) for value in node.args[:1] if isinstance(value, ast.Constant))


def part(where: str) -> str:
    """'vision/tiling.py' -> 'vision'; '' for the package's own __init__."""
    return where.split("/")[0].removesuffix(".py").replace("__init__", "")


def violations(where: str, source: str) -> list[str]:
    """What one file does that the layering forbids."""
    tree, own = ast.parse(source), part(where)
    found: list[str] = []
    for name in dict.fromkeys(imports(tree, where)):
        top, _, rest = name.partition(".")
        if top in ONLY_IN and not any(fnmatch(where, pattern) for pattern in ONLY_IN[top]):
            found.append(f"{where} imports {name}")
        other = rest.split(".")[0]
        if top != PACKAGE or own == other or not {own, other} <= RANK.keys():
            continue  # the package's own __init__ offers public names of all layers
        if RANK[other] > RANK[own] or (own, other) in NEVER:
            found.append(f"{where} imports {name}")
    if not any(fnmatch(where, pattern) for pattern in MAY_PRINT):
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        found += [f"{where}:{call.lineno} prints" for call in calls if ast.unparse(call.func) == "print"]
    return found


def test_every_file_keeps_to_its_layer() -> None:
    found = [line for where, path in sources().items() for line in violations(where, path.read_text("utf-8"))]
    assert not found, "\n".join(found)


def test_every_module_has_a_layer() -> None:
    assert len(sources()) > 20
    assert {part(where) for where in sources()} - {""} <= RANK.keys()


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("config.py", "from mlx_llama3v.vision.tiling import plan"),
        ("vision/encode.py", "from mlx_llama3v.embeddings import store"),
        ("vision/encode.py", "from mlx_llama3v import projector"),
        ("vision/encode.py", "from ..text import prompt"),
        ("model.py", "def f():\n    import mlx_llama3v.checkpoint"),
        ("train/loss.py", "def f():\n    from mlx_llama3v.vision.siglip import VisionTower"),
        ("data/batches.py", "if TYPE_CHECKING:\n    from mlx_llama3v.vision.image import cut"),
        ("train/loss.py", "from mlx_llama3v.inference import Session"),
        ("checkpoint.py", "import importlib\nimportlib.import_module('mlx_llama3v.train.loss')"),
        ("projector.py", "from mlx_llama3v.weights import convert"),
        ("inference.py", "from mlx_lm import generate"),
        ("weights/siglip.py", "def f():\n    import torch.nn"),
        ("vision/image.py", "def f():\n    print('hello')"),
    ],
)
def test_a_breach_is_seen(where: str, source: str) -> None:
    assert violations(where, source)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("vision/encode.py", "from mlx_llama3v.vision.image import cut\nfrom . import tiling"),
        ("embeddings/embed.py", "from mlx_llama3v.vision.encode import Encoder"),
        ("compat.py", "from mlx_lm.models.llama import Model"),
        ("demo/bases_llama.py", "import torch\nprint(torch)"),
        ("cli/chat.py", "from mlx_llama3v import inference, train\nprint(1)"),
        ("__init__.py", "from mlx_llama3v.inference import load"),
    ],
)
def test_what_is_allowed_is_not_reported(where: str, source: str) -> None:
    assert not violations(where, source)

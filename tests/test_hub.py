"""Where a checkpoint is: a directory, the Hub's cache, the Hub; and its refusals in one sentence. No network here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.hub import resolve


def test_an_existing_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(("flag", "variable"), [(True, ""), (False, "1"), (False, "true")])
def test_offline_never_asks_the_hub(flag: bool, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_HUB_OFFLINE", variable)
    with pytest.raises(CheckpointError, match="offline mode is on"):
        resolve("owner/name", offline=flag)
    assert asked[0]["local_files_only"] is True
    patterns = asked[0]["allow_patterns"]
    assert "*.safetensors" in patterns and not [p for p in patterns if p.endswith((".bin", ".pth", ".py"))]


def test_the_hubs_answer_and_its_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(tmp_path))
    assert resolve("owner/name") == tmp_path

    def fail(repo: str, **options: Any) -> str:
        assert options["local_files_only"] is False
        raise OSError("no route to host\nand a page of details")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"cannot be fetched: no route to host$"):
        resolve("owner/name")


def test_what_cannot_be_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "file")
    for name in ("./models/absent", "absent", "a/b/c", str(tmp_path / "absent")):
        with pytest.raises(CheckpointError, match="neither an existing directory nor a Hub id"):
            resolve(name)


def refusal(kind: str, message: str) -> Exception:
    """An error of the Hub's client, of any of its generations."""
    from huggingface_hub import errors

    made = getattr(errors, kind)
    error = made.__new__(made)
    error.args = (message,)
    return error


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: refusal("GatedRepoError", "401"),
            r"gated; accept its licence at \S+/owner/name and log",
        ),
        (
            lambda: refusal("RepositoryNotFoundError", "401"),
            "does not exist on the Hub, or it is private",
        ),
        (lambda: ConnectionError("reset by peer\n..."), "fetched: reset by peer$"),
        (lambda: refusal("HfHubHTTPError", "500"), "cannot be fetched"),
    ],
)
def test_refusals_say_what_to_do(make: Callable[[], Exception], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(repo: str, **options: Any) -> str:
        raise make()

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=expected):
        resolve("owner/name")


def test_a_connection_that_breaks_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client lets the errors of its HTTP library through, which are no OSError."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    library = HfHubHTTPError.__bases__[0]

    def fail(repo: str, **options: Any) -> str:
        raise library("peer closed connection")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="cannot be fetched: peer closed connection"):
        resolve("owner/name")


def test_what_another_program_fetched_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm leaves the README out; without a network the client then calls the snapshot incomplete."""
    import huggingface_hub
    from huggingface_hub import errors

    if not hasattr(errors, "IncompleteSnapshotError"):
        pytest.skip("this huggingface_hub does not look for missing files")

    def fail(repo: str, **options: Any) -> str:
        raise errors.IncompleteSnapshotError("README.md is missing", str(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert resolve("owner/name", offline=True) == tmp_path

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megamask.provenance import record


@pytest.fixture(autouse=True)
def forget_version() -> None:
    record.code_version.cache_clear()


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_code_version_names_commit_and_uncommitted_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "v9.9")
    monkeypatch.setattr(record, "source_tree", lambda: tmp_path)
    assert record.code_version() == "v9.9"
    (tmp_path / "file").write_text("b")
    record.code_version.cache_clear()
    assert record.code_version() == "v9.9-dirty"


@pytest.mark.parametrize("has_folder", [True, False])
def test_code_version_is_the_packages_without_a_readable_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_folder: bool
) -> None:
    monkeypatch.setattr(record, "source_tree", lambda: tmp_path if has_folder else None)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(record, "_version", lambda name: "1.2" if name == "megamask" else None)
    assert record.code_version() == "megamask-1.2"


@pytest.mark.parametrize(
    ("package", "has_git", "is_tree"),
    [("platform/megamask", True, True), ("platform/megamask", False, False), ("lib/megamask", True, False)],
)
def test_source_tree_is_only_a_checkout_of_this_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, has_git: bool, is_tree: bool
) -> None:
    if has_git:
        (tmp_path / ".git").mkdir()
    monkeypatch.setattr(record, "__file__", str(tmp_path / package / "provenance" / "record.py"))
    assert record.source_tree() == (tmp_path if is_tree else None)


def test_library_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_LIBRARIES", ("numpy", "no-such-library"))
    versions = record.library_versions()
    assert list(versions) == ["python", "numpy"]
    assert versions["numpy"][0].isdecimal()

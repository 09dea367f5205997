from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megamask.checkpoint.commit import Commit, CommitFields, begin, publish
from megamask.checkpoint.integrity import digest_and_flush


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def commit_step(run_dir: Path) -> Callable[..., Commit]:
    """Commits a small checkpoint with two files, by the protocol."""

    def make(
        step: int, attempt: int = 1, parent: str | None = None, bound: float | None = None, run_id: str = "r"
    ) -> Commit:
        folder = begin(run_dir, step, attempt)
        (folder / "weights.bin").write_bytes(bytes([step % 256]) * 3000)
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        files = {name: digest_and_flush(folder, name) for name in ("weights.bin", "tokenizer/tokenizer.json")}
        evaluation = None if bound is None else {"nelbo_nats_per_token": repr(bound), "standard_error": "0.5"}
        fields = CommitFields(
            run_id=run_id, parent=parent, state={"step": step}, corpora={"main": "c" * 64}, evaluation=evaluation
        )
        return publish(folder, files, fields)

    return make


def flip_byte(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture(name="flip_byte")
def flip_byte_fixture() -> Callable[..., None]:
    return flip_byte

"""Edits of a run's journal, and the search for a finding in the answer of `megamask verify run`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamask.storage.hashing import sha256_bytes

Verify = Callable[..., dict[str, Any]]


def found(answer: dict[str, Any], problem: str, file: str | None = None, line: int | None = None) -> None:
    """One of the findings reports it, there."""
    matches = [entry for entry in answer["findings"] if problem in entry["problem"]]
    assert matches, answer["findings"]
    assert file is None or any(entry["file"] == file for entry in matches), matches
    assert line is None or any(entry["line"] == line for entry in matches), matches


def lines_of(run_dir: Path, attempt: int) -> list[dict[str, Any]]:
    path = run_dir / "journal" / f"attempt-{attempt:04d}-000.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(run_dir: Path, change: Callable[[int, list[dict[str, Any]]], object]) -> None:
    """Changes journal lines and chains all of them anew, as a forger would; commits keep what they name."""
    previous, seq = "0" * 64, 0
    for attempt in (1, 2):
        lines = lines_of(run_dir, attempt)
        change(attempt, lines)
        data = b""
        for line in lines:
            seq += 1
            line.update(seq=seq, prev=previous)
            text = json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode()
            previous = sha256_bytes(text)
            data += text + b"\n"
        (run_dir / "journal" / f"attempt-{attempt:04d}-000.jsonl").write_bytes(data)


def place(lines: list[dict[str, Any]], kind: str, step: int | None = None) -> int:
    return next(n for n, line in enumerate(lines) if line["kind"] == kind and step in (None, line.get("step")))


NEWEST = "checkpoints/step-00000006-a0002"

"""Changing what a run, a corpus or a checkpoint contains, as an accident or a person would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit_run_record(run_dir: Path, **changes: Any) -> None:
    """Another run.json, as of a run that was begun before the file had a digest of its own."""
    path = run_dir / "run.json"
    content = {**json.loads(path.read_bytes()), **changes}
    content.pop("self_sha256", None)
    path.write_text(json.dumps(content))


def flip_byte(path: Path, at: int, mask: int = 1) -> None:
    """Changes bits of one byte of a file in place; a negative place counts from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)

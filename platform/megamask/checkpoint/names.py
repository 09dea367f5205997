"""Names in a checkpoint tree: folders of commits, and files inside one."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

COMMIT_NAME = "COMMIT.json"
STATE_NAME = "state.json"
MODEL_NAME = "model.json"
TOKENIZER_NAME = "tokenizer"
ORIGIN_NAME = "origin.json"
HUB_FOLDER_NAME = "hub"
LATEST_NAME = "latest"
TRASH_PREFIX = ".removing-"
PIN_SUFFIX = ".pinned"
DAMAGED_SUFFIX = ".damaged"

_FOLDER = re.compile(r"step-(\d{8,})-a(\d{4,})")


def folder_name(step: int, attempt: int) -> str:
    """The folder of a commit, as step-00000200-a0001."""
    return f"step-{step:08d}-a{attempt:04d}"


def parse_folder_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a folder name, or None where the name is not one that `folder_name` writes."""
    match = _FOLDER.fullmatch(name)
    if match is None:
        return None
    step, attempt = int(match[1]), int(match[2])
    return (step, attempt) if folder_name(step, attempt) == name else None


def is_plain_name(name: str) -> bool:
    """Return whether a file name of a COMMIT is relative, in normal form and in its folder: without '..' or '\\'."""
    if not name or "\\" in name or "\0" in name or any(ord(letter) < 32 for letter in name):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."

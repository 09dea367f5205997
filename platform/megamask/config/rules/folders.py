"""Folders that are written: on a file system, never in an object store."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megamask.config.rules.problem import Problem

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def folder_problems(key: str, value: str, *, needs: str, instead: str) -> Iterator[Problem]:
    """Yield a problem if a folder that is written is given as a URL.

    Args:
        needs: continues "is in an object store, which has no ..." with what writing there takes.
        instead: continues "a folder; ..." with how its content reaches a store.
    """
    if _URL.match(value):
        yield Problem(
            key=key, because=f"but a URL names an object store, which has no {needs}", allowed=f"a folder; {instead}"
        )

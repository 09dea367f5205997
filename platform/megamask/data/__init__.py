"""Corpora of tokens: `from megamask.data import Corpus`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamask.data.corpus_rows import Corpus

__all__ = ["Corpus"]


def __getattr__(name: str) -> Any:
    """Import `Corpus` when it is asked for: most verbs need less of this room."""
    if name == "Corpus":
        from megamask.data.corpus_rows import Corpus

        return Corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

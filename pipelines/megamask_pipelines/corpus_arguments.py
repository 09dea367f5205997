"""`--corpus NAME=FOLDER` arguments, shared by the verbs that read a run's corpora."""

from __future__ import annotations

from collections.abc import Sequence

from megamask.errors import UsageError


def corpora_of(given: Sequence[str], *, outcome: str) -> dict[str, str]:
    """Return the folder by name.

    Args:
        outcome: what did not happen; ends the message of an error.

    Raises:
        UsageError: a pair that is not NAME=FOLDER.
    """
    corpora = {}
    for pair in given:
        name, sign, folder = pair.partition("=")
        if not (name and sign and folder):
            raise UsageError(f"--corpus is {pair!r}; allowed: NAME=FOLDER. {outcome}")
        corpora[name] = folder
    return corpora

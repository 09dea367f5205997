"""Rows excluded from a run: an explicit list in the config, never a decision of the reader.

A quarantined row keeps its place in the order, with no eligible token and no documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megamask.data.manifest import Manifest
from megamask.errors import UsageError


class _Source(Protocol):
    manifest: Manifest


def quarantined_rows(entries: Sequence[str], sources: Mapping[str, _Source]) -> dict[str, npt.NDArray[np.int64]]:
    """The rows of `data.quarantine` by source, ascending.

    Args:
        entries: NAME:ROW, or NAME:FIRST-LAST, of rows of the training split.
        sources: by name.

    Raises:
        UsageError: an entry is of another form, or no such source or row exists.
    """
    rows: dict[str, set[int]] = {}
    for entry in entries:
        name, _, numbers = entry.rpartition(":")
        first, sign, last = numbers.partition("-")
        is_range = first.isdecimal() and (last.isdecimal() if sign else True)
        if name not in sources or not is_range:
            raise UsageError(
                f"data.quarantine has {entry!r}; allowed: NAME:ROW or NAME:FIRST-LAST with NAME one of "
                f"{', '.join(sources)}. No batch was read."
            )
        begin, end = int(first), int(last if sign else first)
        num_rows = sources[name].manifest.split("train").num_rows
        if not begin <= end < num_rows:
            raise UsageError(
                f"data.quarantine has {entry!r}; the training split of {name} has rows 0 to {num_rows - 1}. "
                "No batch was read."
            )
        rows.setdefault(name, set()).update(range(begin, end + 1))
    return {name: np.array(sorted(numbers), dtype=np.int64) for name, numbers in rows.items()}

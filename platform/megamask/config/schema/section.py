"""The base of every section: what it needs of the other sections, it checks itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megamask.config.rules.problem import Problem


class Section:
    """A section of settings. A subclass is a frozen, keyword-only dataclass in a file of its own.

    A new section takes that file and one line in schema/roots.py. Single values are checked by their `Setting`; what
    depends on more than one key is the section's `problems`.
    """

    __slots__ = ()

    def problems(self, config: Any) -> Iterator[Problem]:
        """Yield the keys of this section that do not fit the rest, the first to mention first.

        Args:
            config: the complete tree, a TrainConfig or PrepareConfig.
        """
        del config
        yield from ()

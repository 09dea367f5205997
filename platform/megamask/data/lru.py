"""A small cache that drops the least recently used value."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LeastRecentlyUsed(Generic[K, V]):
    """At most `limit` values, each made on first use; for one thread at a time.

    Args:
        limit: values kept, >= 1.
        on_drop: called with each dropped value (to close a file, for instance).
    """

    def __init__(self, limit: int, *, on_drop: Callable[[V], object] | None = None) -> None:
        self._limit = limit
        self._on_drop = on_drop
        self._values: OrderedDict[K, V] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K, make: Callable[[K], V]) -> V:
        """Return the value of a key, made if it is missing. An error while making it leaves the cache unchanged."""
        values = self._values
        if key in values:
            values.move_to_end(key)
            return values[key]
        value = make(key)
        self._values[key] = value
        while len(self._values) > self._limit:
            self._drop(self._values.popitem(last=False)[1])
        return value

    def clear(self) -> None:
        """Drop all values."""
        while self._values:
            self._drop(self._values.popitem(last=False)[1])

    def _drop(self, value: V) -> None:
        if self._on_drop is not None:
            self._on_drop(value)

"""Selection of documents: filters, each applied to one text alone, then removal of duplicates over all documents.

A step drops documents, never changes one, and is counted in the manifest. The order is fixed: the filters in the order
of FILTERS, a document counts for the first that drops it; then duplicates, of which the first in document order stays.

Near duplicates are found by MinHash over 5-grams of words and locality-sensitive hashing, of the datasketch library.
Source: A. Broder, "On the resemblance and containment of documents", 1997.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megamask.config.schema.corpus import CorpusConfig
from megamask.data.corpus.splits import decimal_text
from megamask.errors import UsageError

if TYPE_CHECKING:
    from megamask.data.corpus.documents import DocumentList

KEPT = -1
NUM_PERMUTATIONS = 128
_WORDS = re.compile(r"\w+")
_SHINGLE = 5  # words
_SCHEME = "affine32"


def _letters(text: str) -> float:
    visible = sum(not character.isspace() for character in text)
    return sum(character.isalpha() for character in text) / visible if visible else 0.0


def _repeated_lines(text: str) -> float:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# name of the setting -> whether a text is dropped under its value
FILTERS: dict[str, Callable[[str, float], bool]] = {
    "broken_unicode": lambda text, _: _is_broken(text),
    "min_characters": lambda text, value: len(text) < value,
    "max_characters": lambda text, value: len(text) > value,
    "min_letters": lambda text, value: _letters(text) < value,
    "max_repeated_lines": lambda text, value: _repeated_lines(text) > value,
}


class Selector:
    """The steps that a config asks for; none by default."""

    def __init__(self, config: CorpusConfig) -> None:
        asked = {name: getattr(config.filters, name) for name in FILTERS}
        self._filters = [
            (name, float(value)) for name, value in asked.items() if value is not None and value is not False
        ]
        self._duplicates = config.deduplicate
        self._threshold = config.near_duplicate_threshold

    @property
    def needs_signatures(self) -> bool:
        """True if each document needs its MinHash."""
        return self._duplicates == "near"

    def options(self) -> dict[str, Any]:
        """Return the options that the manifest records: only those requested."""
        options: dict[str, Any] = {}
        if self._filters:
            options["filters"] = {name: decimal_text(value) for name, value in self._filters}
        if self._duplicates != "none":
            options["deduplicate"] = self._duplicates
        if self.needs_signatures:
            options["near_duplicate_threshold"] = decimal_text(self._threshold)
        return options

    def drops(self, text: str) -> int:
        """Number of the first filter that drops a text, or KEPT."""
        return next((n for n, (name, value) in enumerate(self._filters) if FILTERS[name](text, value)), KEPT)

    def signature(self, text: str) -> npt.NDArray[np.uint32]:
        """MinHash of a text, uint32 [NUM_PERMUTATIONS]."""
        sketch = _datasketch().MinHash(num_perm=NUM_PERMUTATIONS, seed=1, scheme=_SCHEME)
        words = _WORDS.findall(text.lower())
        shingles = {" ".join(words[at : at + _SHINGLE]) for at in range(max(1, len(words) - _SHINGLE + 1))}
        sketch.update_batch([shingle.encode(errors="surrogatepass") for shingle in shingles])
        return np.asarray(sketch.hashvalues, dtype=np.uint32)

    def select(self, documents: DocumentList) -> Selection:
        """Decide over all documents of the inputs, in order."""
        dropped = np.array(documents.dropped_by, dtype=np.int64)
        names = [name for name, _ in self._filters]
        if self._duplicates != "none":
            _drop_equal(documents, dropped, len(names))
            names.append("equal_documents")
        if self.needs_signatures:
            _drop_similar(documents, dropped, len(names), self._threshold)
            names.append("similar_documents")
        sizes = np.array(documents.text_bytes, dtype=np.int64)
        steps = [
            {
                "name": name,
                "documents": int((dropped == number).sum()),
                "text_bytes": int(sizes[dropped == number].sum()),
            }
            for number, name in enumerate(names)
        ]
        return Selection(is_kept=dropped == KEPT, steps=steps)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Return the mask of kept documents, bool [documents], and the counts of each step: name, documents, text_bytes."""

    is_kept: npt.NDArray[np.bool_]
    steps: Sequence[dict[str, Any]]


def _drop_equal(documents: DocumentList, dropped: npt.NDArray[np.int64], step: int) -> None:
    seen: set[bytes] = set()
    for number in np.flatnonzero(dropped == KEPT).tolist():
        digest = documents.text_sha256(number)
        if digest in seen:
            dropped[number] = step
        seen.add(digest)


def _drop_similar(documents: DocumentList, dropped: npt.NDArray[np.int64], step: int, threshold: float) -> None:
    datasketch = _datasketch()
    index = datasketch.MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS)
    for number in np.flatnonzero(dropped == KEPT).tolist():
        values = documents.signatures[number]
        sketch = datasketch.MinHash(num_perm=NUM_PERMUTATIONS, seed=1, scheme=_SCHEME, hashvalues=values)
        if any(np.mean(documents.signatures[other] == values) >= threshold for other in index.query(sketch)):
            dropped[number] = step
        else:
            index.insert(number, sketch)


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise UsageError(
            "corpus.deduplicate is near, which needs the package datasketch. Nothing was written.",
            hint="install megamask with its extra: pip install 'megamask[data]'; or set corpus.deduplicate=exact",
        ) from error
    return datasketch

"""Answers in a corpus of conversations, as the document lists of its rows hold them.

A conversation is one document of the corpus, laid down in segments: what was given and what was answered, by turns. In
docs.npy each segment has an entry of its own; those of an answer have the number -n - 1, n the document's number. A
corpus without conversations has no negative number.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


def answer_number(document: int) -> int:
    """The number under which the answers of a document are listed."""
    return -document - 1


def document_of(numbers: Int64Array) -> Int64Array:
    """The document of each listed number."""
    return np.where(numbers < 0, -numbers - 1, numbers)


def answered(documents: Int64Array, length: int) -> npt.NDArray[np.bool_]:
    """The tokens of a row that are part of an answer: bool [length].

    Args:
        documents: int64 [n, 2], (start, number) of each segment in the row, ascending.
    """
    is_answer = np.zeros(length, dtype=np.bool_)
    if len(documents) == 0:  # a quarantined row
        return is_answer
    stops = [*documents[1:, 0].tolist(), length]
    for (start, number), stop in zip(documents.tolist(), stops, strict=True):
        is_answer[start:stop] = number < 0
    return is_answer


def without_roles(docs: Int64Array) -> Int64Array:
    """The document list of a block as if each document had one segment in a row: int64 [n, 3] -> [m, 3]."""
    plain = docs.copy()
    plain[:, 2] = document_of(docs[:, 2])
    is_first = np.ones(len(plain), dtype=np.bool_)
    is_first[1:] = (plain[1:, [0, 2]] != plain[:-1, [0, 2]]).any(axis=1)
    return plain[is_first]

"""Choice of the validation documents, by their text alone, before anything is packed.

A document is validation when the first 8 bytes of its text's sha256, read little-endian, are below
validation_fraction * 2^64. The same text is therefore always on the same side, in any corpus and at any place of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megamask.errors import UsageError

TRAIN = "train"
VALIDATION = "validation"


def decimal_text(fraction: float) -> str:
    """The shortest decimal that reads back as this number, without exponent: 0.02 -> "0.02", 1e-5 -> "0.00001"."""
    text = format(Decimal(repr(fraction)), "f")
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


def split_hash(text_sha256: bytes) -> int:
    """The number in [0, 2^64) that decides a document's split."""
    return int.from_bytes(text_sha256[:8], "little")


def choose_validation(hashes: Sequence[int], validation_fraction: str) -> npt.NDArray[np.bool_]:
    """Return the mask of validation documents.

    If the fraction is above 0 and chooses none, the document with the smallest (hash, number) is taken; if it chooses
    all, the one with the largest stays in train.

    Args:
        hashes: `split_hash` of each document, by number.
        validation_fraction: decimal string in [0, 1); compared exactly.

    Returns:
        bool [n].

    Raises:
        UsageError: a single document cannot be both trained on and held out.
    """
    fraction = Fraction(validation_fraction)
    if not 0 <= fraction < 1:
        raise UsageError(
            f"corpus.validation_fraction is {validation_fraction}; allowed: >= 0 and < 1. Nothing was written."
        )
    chosen = np.zeros(len(hashes), dtype=np.bool_)
    if fraction == 0:
        return chosen
    if len(hashes) == 1:
        raise UsageError(
            f"corpus.validation_fraction is {validation_fraction}, but the inputs hold a single document, which cannot "
            "be both trained on and held out. Nothing was written.",
            hint="set corpus.validation_fraction to 0, or give more documents (a text file is one, a .jsonl line too)",
        )
    for number, value in enumerate(hashes):
        chosen[number] = value * fraction.denominator < fraction.numerator << 64
    if len(hashes) and not chosen.any():
        chosen[min(range(len(hashes)), key=lambda number: (hashes[number], number))] = True
    elif chosen.all() and len(hashes):
        chosen[max(range(len(hashes)), key=lambda number: (hashes[number], number))] = False
    return chosen

"""The special tokens of a corpus, and the document that names them."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.errors import DataIntegrityError, UsageError
from megamask.storage.documents import DocumentKind

NUM_SPECIAL = 3
SPECIAL_TOKENS = DocumentKind(
    format="megamask-special-tokens",
    version=1,
    damage=DataIntegrityError,
    damage_hint="restore the folder or prepare the corpus again",
    outcome="Nothing was decoded.",
)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The three strings that mark the end of a document, padding, and a masked position.

    A corpus has all three; the tokenizer of an imported model may lack some.
    """

    eod: str | None
    pad: str | None
    mask: str | None

    def check(self) -> None:
        """Check the strings.

        Raises:
            UsageError: they are not three different ones, or one is empty.
        """
        tokens = [self.eod, self.pad, self.mask]
        if len(set(tokens)) != NUM_SPECIAL or not all(tokens):
            raise UsageError(
                f"corpus.tokenizer.eod_token, pad_token and mask_token are {tokens}; allowed: three different strings, "
                "none of them empty. Nothing was written."
            )

"""The special tokens of a corpus."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.errors import UsageError

NUM_SPECIAL = 3


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The three strings that mark the end of a document, padding, and a masked position.

    A corpus has all three; the tokenizer of an imported model may lack some.
    """

    eod: str | None
    pad: str | None
    mask: str | None

    def check(self) -> None:
        """Refuses strings that are empty or not three.

        Raises:
            UsageError: naming the keys.
        """
        tokens = [self.eod, self.pad, self.mask]
        if len(set(tokens)) != NUM_SPECIAL or not all(tokens):
            raise UsageError(
                f"corpus.tokenizer.eod_token, pad_token and mask_token are {tokens}; allowed: three different strings, "
                "none of them empty. Nothing was written."
            )

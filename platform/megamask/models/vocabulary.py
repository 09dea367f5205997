"""The token ids that a model knows."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.errors import UsageError

NO_ID = -1
"""Of a special token that a model does not have; no token id equals it."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Sizes of a vocabulary and its special ids.

    Args:
        vocab_size: entries of the tokenizer, special ones included; only these enter a softmax.
        padded_vocab_size: rows of the embedding on devices, rounded up by `model.vocab_padding_multiple`.
        mask_token_id: [M]; never a target.
        eod_token_id: end of document; an eligible token.
        pad_token_id: padding; never eligible.

    An imported model may lack any of the three, which is then NO_ID.

    Raises:
        UsageError: when an id lies outside the vocabulary, or [M] is also end of document or padding.
    """

    vocab_size: int
    padded_vocab_size: int
    mask_token_id: int
    eod_token_id: int
    pad_token_id: int

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= self.padded_vocab_size:
            raise UsageError(
                f"vocabulary of {self.vocab_size} entries padded to {self.padded_vocab_size}; allowed: at least 1 "
                "entry and no fewer rows than entries. Nothing was built."
            )
        for name in ("mask_token_id", "eod_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value != NO_ID and not 0 <= value < self.vocab_size:
                raise UsageError(f"{name} is {value}; allowed: 0 to {self.vocab_size - 1}. Nothing was built.")
        if self.mask_token_id != NO_ID and self.mask_token_id in (self.eod_token_id, self.pad_token_id):
            raise UsageError(
                f"mask_token_id is {self.mask_token_id}, which is also end of document or padding; allowed: an id of "
                "its own. Nothing was built."
            )

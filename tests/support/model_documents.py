"""A small model document for tests that store one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megamask.checkpoint.contents import ModelDocument
from megamask.models.vocabulary import Vocabulary
from support.objectives import masked_objective
from support.specs import PLAIN


def model_document(**changes: Any) -> ModelDocument:
    """Two layers, 26 tokens, of which 23, 24 and 25 are end-of-document, padding and mask."""
    vocabulary = Vocabulary(vocab_size=26, padded_vocab_size=128, eod_token_id=23, pad_token_id=24, mask_token_id=25)
    document = ModelDocument(
        spec=replace(
            PLAIN, hidden_size=16, ffn_hidden_size=32, head_dim=4, init_std=0.02, vocab_size=26, padded_vocab_size=128
        ),
        vocabulary=vocabulary,
        objective=masked_objective(vocabulary),
        tokenizer_digest="d" * 64,
    )
    return replace(document, **changes)

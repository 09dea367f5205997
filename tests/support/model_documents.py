"""A small model document for tests that store one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megamask.checkpoint.contents import ModelDocument
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from support.objectives import masked_objective


def model_document(**changes: Any) -> ModelDocument:
    """Two layers, 26 tokens, of which 23, 24 and 25 are end-of-document, padding and mask."""
    vocabulary = Vocabulary(vocab_size=26, padded_vocab_size=128, eod_token_id=23, pad_token_id=24, mask_token_id=25)
    document = ModelDocument(
        spec=ModelSpec(
            num_layers=2,
            hidden_size=16,
            ffn_hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=4,
            qk_norm=False,
            qkv_bias=False,
            tie_embeddings=False,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            init_std=0.02,
            vocab_size=26,
            padded_vocab_size=128,
            max_sequence_length=32,
        ),
        vocabulary=vocabulary,
        objective=masked_objective(vocabulary),
        tokenizer_digest="d" * 64,
    )
    return replace(document, **changes)

"""Small networks for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from megamask.config.schema.model import ModelConfig
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary

PLAIN = ModelSpec(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    qk_norm=False,
    qkv_bias=False,
    tie_embeddings=False,
    rope_theta=10000.0,
    norm_eps=1e-5,
    init_std=0.05,
    vocab_size=61,
    padded_vocab_size=64,
    max_sequence_length=32,
)
# every option at once, a head width that is not hidden_size / heads, and a shard of padding only when cut in two
OPTIONS = dataclasses.replace(
    PLAIN, qk_norm=True, qkv_bias=True, tie_embeddings=True, head_dim=16, padded_vocab_size=128, rope_theta=500.0
)


def small_config(**changes: Any) -> ModelConfig:
    """Two layers; odd enough that no two sizes are equal."""
    sizes = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2}
    return ModelConfig(**(sizes | changes))


def small_spec(vocab_size: int = 101, sequence_length: int = 32, **changes: Any) -> ModelSpec:
    """The completed small_config."""
    return ModelSpec.from_config(small_config(**changes), vocab_size, sequence_length)


def vocabulary_of(spec: ModelSpec) -> Vocabulary:
    """The last three entries are mask, end of document and padding."""
    size = spec.vocab_size
    return Vocabulary(
        vocab_size=size,
        padded_vocab_size=spec.padded_vocab_size,
        mask_token_id=size - 3,
        eod_token_id=size - 2,
        pad_token_id=size - 1,
    )

"""Small networks for tests."""

from __future__ import annotations

from typing import Any

from megamask.config.schema.model import ModelConfig
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary


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

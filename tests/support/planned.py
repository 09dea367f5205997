"""Networks and runs for tests of the planner."""

from __future__ import annotations

from typing import Any

from megamask.config.rules.layout import AxisSizes
from megamask.models.spec import ModelSpec
from megamask.objectives.shapes import ObjectiveShape, shape_of
from megamask.planning.subject import Subject


def dense(*, layers: int, hidden: int, forward: int, heads: int, groups: int, vocabulary: int) -> ModelSpec:
    return ModelSpec(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=forward,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        qk_norm=False,
        qkv_bias=False,
        tie_embeddings=False,
        rope_theta=10000.0,
        norm_eps=1e-5,
        init_std=0.02,
        vocab_size=vocabulary,
        padded_vocab_size=-(-vocabulary // 128) * 128,
        max_sequence_length=4096,
    )


def shape(spec: ModelSpec, **settings: Any) -> ObjectiveShape:
    return shape_of({"name": "masked", "complementary": True} | settings, spec.max_sequence_length)


def subject_of(spec: ModelSpec, axes: AxisSizes, **settings: Any) -> Subject:
    return Subject(
        **(
            {
                "spec": spec,
                "axes": axes,
                "shape": shape(spec),
                "global_batch_size": 1024,
                "micro_batch_size": 1,
                "compute": "bf16",
                "head_rows": spec.max_sequence_length,
                "head_chunk_rows": 2048,
            }
            | settings
        )
    )

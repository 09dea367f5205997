"""Operations of a step by objective, against the published formula and a count of visible pairs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megamask.config.rules.layout import AxisSizes
from megamask.models.context import BlockPattern, Causal, Context, visible_mask
from megamask.planning.work import work_per_token
from support.engine_cases import PLAIN
from support.planned import shape, subject_of

LENGTH = 64
SPEC = dataclasses.replace(PLAIN, max_sequence_length=LENGTH)
BLOCK = {"name": "block", "block_size": 8, "diffusion_weight": None, "complementary": False}


def layer_matrices() -> int:
    queries, keys = SPEC.num_attention_heads * SPEC.head_dim, SPEC.num_query_groups * SPEC.head_dim
    attention = SPEC.hidden_size * (2 * queries + 2 * keys)
    return SPEC.num_layers * (attention + 3 * SPEC.hidden_size * SPEC.ffn_hidden_size)


@pytest.mark.parametrize(
    ("settings", "rows", "scored"),
    [({"complementary": True}, 2, 1.0), ({"complementary": False}, 1, 0.5)],
    ids=["pair", "single-view"],
)
def test_masked_diffusion_costs_what_the_formula_of_mfu_counts(settings: dict, rows: int, scored: float) -> None:
    """6 (rows * N + scored * h * V) + 12 * layers * heads * d * pairs of positions that see each other, per token."""
    work = work_per_token(subject_of(SPEC, AxisSizes(), shape=shape(SPEC, **settings)))
    assert work.matrices == 6 * rows * layer_matrices()
    assert work.head == 6 * scored * SPEC.hidden_size * SPEC.vocab_size
    each_pair = 12 * SPEC.num_layers * SPEC.num_attention_heads * SPEC.head_dim
    assert work.attention == each_pair * rows * LENGTH


@pytest.mark.parametrize(
    ("settings", "context"),
    [
        ({"name": "autoregressive"}, Context(pattern=Causal())),
        (BLOCK, Context(pattern=BlockPattern(block_size=8), positions=torch.arange(LENGTH).repeat(1, 2))),
    ],
    ids=["autoregressive", "block"],
)
def test_attention_counts_the_pairs_that_see_each_other(settings: dict, context: Context) -> None:
    of_objective = shape(SPEC, **settings)
    mask = visible_mask(context, of_objective.input_length, torch.device("cpu"))
    assert mask is not None
    pairs = int(mask.sum())
    work = work_per_token(subject_of(SPEC, AxisSizes(), shape=of_objective))
    each_pair = 12 * SPEC.num_layers * SPEC.num_attention_heads * SPEC.head_dim
    counted = work.attention / each_pair * LENGTH
    # the plan leaves out the diagonal's half (causal) and half of the noised blocks' own: a block in a row of them
    assert math.isclose(counted, pairs, rel_tol=(8 + 1) / LENGTH)

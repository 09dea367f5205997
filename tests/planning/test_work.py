"""Operations of a step by objective, against the published formula and a count of visible pairs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamask.config.rules.layout import AxisSizes
from megamask.models.context import BlockPattern, Causal, Context, visible_mask
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import Samples
from megamask.objectives.block import BlockObjective
from megamask.planning.work import work_per_token
from support.engine_cases import PLAIN, SEED, SEQUENCE_LENGTH, batch, objective, reference, vocabulary
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


OBJECTIVES = {
    "single": objective(complementary=False),
    "pair": objective(),
    "autoregressive": AutoregressiveObjective(vocabulary=vocabulary(PLAIN), mask_logit="excluded"),
    "block": BlockObjective(
        vocabulary=vocabulary(PLAIN), block_size=8, clean_half="block_causal", mask_logit="excluded"
    ),
    "block with the joint loss": BlockObjective(
        vocabulary=vocabulary(PLAIN),
        block_size=8,
        clean_half="token_causal",
        diffusion_weight=0.3,
        mask_logit="excluded",
    ),
}


@pytest.mark.promise("a plan's FLOP counts are those that torch counts on the reference network, for every objective")
@pytest.mark.parametrize("goal", OBJECTIVES.values(), ids=OBJECTIVES)
def test_operations_are_those_that_torch_counts_on_the_reference_network(goal: Any) -> None:
    """Torch multiplies all pairs of positions and hides some, and a step scores a number of rows of its own."""
    spec, count = dataclasses.replace(PLAIN, max_sequence_length=SEQUENCE_LENGTH), 4
    share = batch(list(range(count)), 1)
    samples = Samples(
        tokens=share.tokens,
        is_eligible=torch.ones_like(share.is_eligible),
        sample_index=share.sample_index,
        batch_position=list(range(count)),
        global_batch_size=count,
    )
    rows, network = goal.rows(samples, 1, (SEED, 0)), reference(spec)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:  # products one by one
        hidden = network(rows.inputs, rows.context)
        network.logits(hidden[rows.is_scored]).sum().backward()
    of_objective = goal.shape(SEQUENCE_LENGTH)
    work = work_per_token(subject_of(spec, AxisSizes(), shape=of_objective))
    keys = of_objective.input_length / SEQUENCE_LENGTH  # attended_fraction is of a sample's length
    per_token = work.matrices + keys * work.attention / of_objective.attended_fraction
    scored = 6 * int(rows.is_scored.sum()) * spec.hidden_size * spec.vocab_size
    assert counted.get_total_flops() == samples.tokens.numel() * per_token + scored
    is_exact = of_objective.corrupts == "all"  # others draw how many they score
    expected = work.head * samples.tokens.numel()
    assert scored == expected if is_exact else 0.5 * expected < scored < 1.5 * expected

"""Times, windows, forced masks and pairs of block diffusion against their definitions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megamask.diffusion.block_corruption import block_times
from megamask.diffusion.philox import philox4x32
from megamask.objectives.base import Samples
from megamask.objectives.block import BlockObjective
from support import engine_cases as cases

VOCABULARY = cases.vocabulary(cases.OPTIONS)
MASK, LENGTH, SIZE = VOCABULARY.mask_token_id, 32, 8
KEY, STEP = (cases.SEED, 0), 1


def objective(size: int = SIZE, **changes) -> BlockObjective:
    settings = {"clean_half": "block_causal", "mask_logit": "excluded"} | changes
    return BlockObjective(vocabulary=VOCABULARY, block_size=size, **settings)


def samples(count: int = 64, eligible: int = LENGTH) -> Samples:
    return Samples(
        tokens=torch.arange(count * LENGTH).reshape(count, LENGTH) % 50,
        is_eligible=(torch.arange(LENGTH) < eligible).expand(count, LENGTH),
        sample_index=torch.arange(count),
        batch_position=list(range(count)),
        global_batch_size=count,
    )


def noised(rows, views: int = 1) -> torch.Tensor:
    """[b, views, blocks, size] masks of the noised half."""
    return rows.is_scored[:, :LENGTH].reshape(-1, views, LENGTH // SIZE, SIZE)


@pytest.mark.promise("a complementary pair of block diffusion scores each token of a block in exactly one of its rows")
@pytest.mark.parametrize("weight", [None, 0.3])
def test_pair_masks_in_each_block_what_its_first_view_leaves(weight: float | None) -> None:
    clean = "token_causal" if weight else "block_causal"
    goal = objective(complementary=True, diffusion_weight=weight, clean_half=clean)
    given = samples(eligible=29)
    rows, single = goal.rows(given, STEP, KEY), objective().rows(given, STEP, KEY)
    is_masked = rows.is_scored[:, :LENGTH].reshape(-1, 2, LENGTH)
    assert torch.equal(is_masked[:, 0] ^ is_masked[:, 1], given.is_eligible)
    assert torch.equal(is_masked[:, 0], single.is_scored[:, :LENGTH])
    assert torch.equal(rows.inputs[:, :LENGTH] == MASK, rows.is_scored[:, :LENGTH])
    first, second = rows.weight[::2, :LENGTH].double(), rows.weight[1::2, :LENGTH].double()
    slope = 1 - 2e-3
    # w_A = p'/p and w_B = p'/(1 - p), so p'/w_A + p'/w_B = 1: a weight of the wrong view would show
    torch.testing.assert_close(slope / first + slope / second, torch.ones_like(first), rtol=1e-5, atol=1e-5)
    shape = goal.shape(LENGTH)
    assert (shape.num_views, shape.input_length) == (2, 2 * LENGTH)
    assert int(rows.is_scored.sum(dim=1).reshape(-1, 2).sum(dim=1).max()) <= shape.scored_positions
    scored_clean = rows.is_scored[:, LENGTH:].reshape(-1, 2, LENGTH)
    assert int(scored_clean[:, 0].sum()) == (64 * 28 if weight else 0)
    assert not scored_clean[:, 1].any()


def test_times_of_blocks_are_by_law_one_or_independent() -> None:
    index = torch.tensor([0, 5, 2**33 + 1])
    law = block_times(index, [0.1, 0.5, 0.9], 3, block_time="block", key=KEY)
    assert law[1] == pytest.approx([0.5, (0.5 + 0.6180339887498949) % 1, (0.5 + 2 * 0.6180339887498949) % 1])
    assert block_times(index, [0.1, 0.5, 0.9], 3, block_time="sequence", key=KEY)[2] == [0.9] * 3
    independent = block_times(index, [0.1, 0.5, 0.9], 3, block_time="independent", key=KEY)
    for row, sample in enumerate(index.tolist()):
        for k in range(3):
            w = [int(word) for word in philox4x32((sample % 2**32, sample // 2**32, k, 5), KEY)]
            assert independent[row][k] == (w[0] * 2**21 + w[1] // 2**11) * 2.0**-53


def test_clipped_window_bounds_the_masked_share_and_its_loss_is_no_bound() -> None:
    goal, given = objective(clip_low=0.45, clip_high=0.55), samples(256)
    rows = goal.rows(given, STEP, KEY)
    share = noised(rows).float().mean()
    assert 0.48 < float(share) < 0.52
    weights = rows.weight[:, :LENGTH]
    assert float(weights.min()) >= 1 / 0.55 - 1e-5 and float(weights.max()) <= 1 / 0.45 + 1e-5
    assert [(term.name, term.is_bound) for term in goal.terms] == [("masked_cross_entropy", False)]
    assert [(term.name, term.is_bound) for term in objective().terms] == [("nelbo", True)]


def test_forced_mask_leaves_no_eligible_block_without_one_and_changes_no_other() -> None:
    given = samples(256, eligible=24)
    plain, forced = objective().rows(given, STEP, KEY), objective(forced_mask=True).rows(given, STEP, KEY)
    before, after = noised(plain).sum(dim=3), noised(forced).sum(dim=3)
    assert Counter(before[:, 0, :3].flatten().tolist())[0] > 20  # else the test would show nothing
    assert torch.equal(after[:, :, :3], before[:, :, :3].clamp(min=1))
    assert not after[:, :, 3].any()  # padding alone: nothing to mask
    was = before[..., None].expand_as(noised(plain)) > 0
    assert torch.equal(noised(forced)[was], noised(plain)[was])
    assert torch.equal(forced.inputs[:, :LENGTH] == MASK, forced.is_scored[:, :LENGTH])


@pytest.mark.promise("few masks first, and no weight meanwhile: the mask ratio's warm-up of block diffusion")
def test_mask_ratio_of_blocks_warms_up_and_its_weight_is_dropped() -> None:
    """Stable-DiffCoder's: t of each block is below u, u rising to 1; with a forced mask no block is without one."""
    given = samples()
    warmed, plain = objective(mask_ratio_warmup_steps=5, forced_mask=True), objective(forced_mask=True)
    first, middle, late = (warmed.rows(given, step, KEY) for step in (1, 3, 6))
    assert (noised(first).sum(dim=3) == 1).all(), "almost nothing but the forced masks at first"
    assert (first.weight == 1).all() and (middle.weight == 1).all()
    assert 1 < noised(middle).sum(dim=3).double().mean() < noised(late).sum(dim=3).double().mean()
    expected = plain.rows(given, 6, KEY)
    assert torch.equal(late.weight, expected.weight) and torch.equal(late.is_scored, expected.is_scored)
    assert max(each["t"] for each in warmed.details(given, 3, KEY)) < 0.5005
    assert [term.is_bound for term in warmed.terms] == [False]
    assert objective(mask_ratio_warmup_steps=5).unclipped() == objective()

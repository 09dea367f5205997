"""The target shift, and what eases the first steps after an autoregressive start."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megamask.diffusion.philox import run_key
from megamask.diffusion.schedule import warmed_time
from megamask.errors import UsageError
from megamask.models.context import Causal, Context, EmbeddingNoise, Opening, visible_mask
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Samples
from megamask.objectives.in_force import at_step
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.registry import build_objective
from megamask.objectives.shifted import Shifted, with_shift
from megamask.objectives.warm_start import eased

VOCABULARY = Vocabulary(vocab_size=50, padded_vocab_size=64, mask_token_id=49, eod_token_id=47, pad_token_id=48)
MASKED = MaskedObjective(vocabulary=VOCABULARY, noise_schedule="linear", complementary=True, mask_logit="excluded")
BLOCK = build_objective(
    {"name": "block", "block_size": 4, "clean_half": "block_causal", "mask_logit": "excluded"}, VOCABULARY
)
KEY = run_key(3)


def _samples(length: int = 16) -> Samples:
    tokens = torch.randint(0, 47, (4, length), generator=torch.Generator().manual_seed(1))
    return Samples(
        tokens=tokens,
        is_eligible=torch.ones_like(tokens, dtype=torch.bool),
        sample_index=torch.arange(4),
        batch_position=[0, 1, 2, 3],
        global_batch_size=4,
    )


@pytest.mark.parametrize("inner", [MASKED, BLOCK], ids=["masked", "block"])
@pytest.mark.promise("With a target shift each masked token is scored at the position before it")
def test_a_masked_token_is_scored_one_position_earlier(inner) -> None:
    samples = _samples()
    rows = Shifted(inner=inner).rows(samples, 2, KEY)
    num_views = inner.shape(16).num_views
    clean = samples.tokens.repeat_interleave(num_views, dim=0)
    scored = rows.is_scored.nonzero().tolist()
    assert len(scored) > 10
    for row, position in scored:
        assert position < 15
        assert rows.inputs[row, position + 1] == VOCABULARY.mask_token_id
        assert rows.targets[row, position] == clean[row, position + 1]
    is_masked = (rows.inputs == VOCABULARY.mask_token_id)[:, :16]
    assert torch.equal(rows.is_scored[:, :15], is_masked[:, 1:]), "every masked token is scored"
    assert not is_masked[:, 0].any(), "the first token is given"
    plain = inner.rows(samples, 2, KEY)
    moved = rows.weight[:, :15][rows.is_scored[:, :15]]
    assert torch.equal(moved, plain.weight[:, 1:16][rows.is_scored[:, :15]])


def test_bound_and_decoder_shift_alike() -> None:
    objective, samples = Shifted(inner=MASKED), _samples()
    is_scored = objective.bound.scored(samples.tokens, samples.is_eligible)
    assert not is_scored[:, 0].any()
    drawn = objective.bound.draw(
        samples.tokens, is_scored, torch.arange(4), replicate=0, member=0, draws=2, key=KEY
    ).rows
    assert torch.equal(drawn.is_scored[:, :15], (drawn.inputs == 49)[:, 1:])
    is_open = torch.zeros(1, 16, dtype=torch.bool)
    is_open[0, [3, 7]] = True
    reading = objective.decoder.reading(samples.tokens[:1], is_open)
    assert (reading.shift, reading.is_read.nonzero()[:, 1].tolist()) == (1, [2, 6])
    assert objective.decoder.opening == (47,)
    with pytest.raises(UsageError, match="the first one has none"):
        objective.decoder.blocks(samples.tokens[0], torch.tensor([0, 1]), None)


def test_a_shift_ends_at_its_step_and_is_in_the_record() -> None:
    objective, samples = with_shift(MASKED, 3), _samples()
    assert objective.record() == {**MASKED.record(), "target_shift": 3}
    assert build_objective(objective.record(), VOCABULARY) == objective
    assert torch.equal(objective.rows(samples, 4, KEY).targets, MASKED.rows(samples, 4, KEY).targets)
    assert not torch.equal(objective.rows(samples, 3, KEY).targets, MASKED.rows(samples, 3, KEY).targets)
    assert at_step(objective, 3) == Shifted(inner=MASKED)
    assert at_step(objective, 4) == MASKED
    for shift in (0, -1, 2.0, "keep"):
        with pytest.raises(UsageError, match="target_shift"):
            with_shift(MASKED, shift)  # type: ignore[arg-type]


@pytest.mark.promise("Causal attention opens cell by cell, from causal to full, the same on every layout")
def test_attention_opens_with_the_stated_probability() -> None:
    length, steps = 128, 8
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    opened = {}
    objective = eased(MASKED, attention_annealing_steps=steps)
    for step in range(1, steps + 1):
        context = objective.context(_samples(), step, KEY)
        mask = visible_mask(context, length, torch.device("cpu"))
        if step == steps:
            assert mask is None
            break
        assert mask is not None
        assert mask[0][~later].all()
        opened[step] = mask[0][later].double().mean().item()
        # 8,128 cells: six standard deviations of a binomial share
        share = step / steps
        assert abs(opened[step] - share) < 6 * math.sqrt(share * (1 - share) / later.sum().item())
    one, other = (
        visible_mask(Context(pattern=Opening(limit=1 << 31, step=s, key=KEY)), 64, torch.device("cpu")) for s in (1, 2)
    )
    assert not torch.equal(one, other), "each step has a draw of its own"
    closed = visible_mask(Context(pattern=Opening(limit=0, step=1, key=KEY)), 64, torch.device("cpu"))
    assert torch.equal(closed, visible_mask(Context(pattern=Causal()), 64, torch.device("cpu")))


def test_noise_is_gaussian_and_belongs_to_the_place() -> None:
    noise = EmbeddingNoise(row_index=torch.tensor([5, 9]), std=2.0, token_id=49, key=KEY)
    is_noised = torch.ones(2, 64, dtype=torch.bool)
    values = noise.values(is_noised, 32).view(2, 64, 32)
    # 4,096 values: six standard errors of mean and variance
    assert abs(values.mean().item()) < 6 * 2 / math.sqrt(values.numel())
    assert abs(values.var().item() / 4 - 1) < 6 * math.sqrt(2 / values.numel())
    some = is_noised.clone()
    some[:, ::2] = False
    assert torch.equal(noise.values(some, 32).view(2, 32, 32), values[:, 1::2])
    swapped = EmbeddingNoise(row_index=torch.tensor([9, 5]), std=2.0, token_id=49, key=KEY)
    assert torch.equal(swapped.values(is_noised, 32).view(2, 64, 32), values.flip(0))


def test_the_noise_level_rises_and_its_weight_is_dropped() -> None:
    assert [warmed_time(1.0, step, 5) for step in (1, 3, 5, 6)] == [0.001, 0.5005, 1.0, 1.0]
    assert warmed_time(0.25, 1, 0) == 0.25
    objective = build_objective({**MASKED.record(), "mask_ratio_warmup_steps": 5}, VOCABULARY)
    samples = _samples(64)
    early, late = objective.rows(samples, 1, KEY), objective.rows(samples, 6, KEY)
    views = early.inputs[::2]
    assert (views == 49).sum() <= 2, "almost nothing is masked at first"
    assert (early.weight == 1).all()
    assert torch.equal(late.weight, MASKED.rows(samples, 6, KEY).weight)
    assert [term.is_bound for term in objective.terms] == [False]


@pytest.mark.promise("with isolated documents a target shift gives each document's first token, as autoregression does")
@pytest.mark.parametrize("name", ["masked", "block"])
def test_first_tokens_of_isolated_documents_are_given(name: str) -> None:
    """Nothing that such a token may see is read at the position before it."""
    settings = {"block_size": 4, "clean_half": "block_causal"} if name == "block" else {"complementary": False}
    record = {"name": name, "noise_schedule": "linear", "mask_logit": "excluded", "isolate_documents": True, **settings}
    objective = with_shift(build_objective(record, VOCABULARY), True)
    plain = _samples(16)
    tokens = plain.tokens.clone()
    tokens[:, [5, 11]] = VOCABULARY.eod_token_id
    seen = objective.seen(replace(plain, tokens=tokens), KEY)
    starts = torch.zeros_like(plain.is_eligible)
    starts[:, [0, 6, 12]] = True
    for step in (1, 2, 3):
        rows = objective.rows(seen, step, KEY)
        read = rows.is_scored[:, : tokens.size(1)]
        assert read.any() and not read[:, [5, 11]].any(), "no position predicts a token of the next document"
        assert not (rows.inputs[:, : tokens.size(1)][starts] == VOCABULARY.mask_token_id).any()
    causal = build_objective(
        {"name": "autoregressive", "mask_logit": "excluded", "isolate_documents": True}, VOCABULARY
    )
    eligible = plain.is_eligible
    assert torch.equal(objective.bound.scored(tokens, eligible), causal.bound.scored(tokens, eligible))

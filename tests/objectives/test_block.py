"""Block diffusion against a plain network that reads one block at a time after its clean prefix."""

from __future__ import annotations

import math

import pytest
import torch

from megamask.errors import UsageError
from megamask.evaluation.likelihood import evaluate_rows
from megamask.evaluation.reference_network import ReferenceScore
from megamask.generation.confidence import DecodingOptions, decode
from megamask.generation.predictor import ReferencePredictor
from megamask.models import reference
from megamask.models.context import Causal, Context
from megamask.objectives.base import Rows, Samples
from megamask.objectives.block import BlockObjective, block_numbers, doubled_context
from support import engine_cases as cases

SPEC = cases.OPTIONS
VOCABULARY = cases.vocabulary(SPEC)
MASK, LENGTH = VOCABULARY.mask_token_id, cases.SEQUENCE_LENGTH
STEP, KEY = 1, (cases.SEED, 0)


def objective(size: int = 8, **changes) -> BlockObjective:
    settings = {"clean_half": "block_causal", "mask_logit": "excluded"} | changes
    return BlockObjective(vocabulary=VOCABULARY, block_size=size, **settings)


def samples(count: int = 8) -> Samples:
    share = cases.batch(list(range(count)), STEP)
    return Samples(
        tokens=share.tokens,
        is_eligible=share.is_eligible,
        sample_index=share.sample_index,
        batch_position=list(range(count)),
        global_batch_size=count,
    )


def block_costs(monkeypatch, model, x_0, x_t, first: int, size: int, clean: str) -> torch.Tensor:
    """Cross entropy of one block's tokens: the network reads the clean prefix and this noised block, nothing else."""
    stop = min(first + size, len(x_0))
    place = torch.arange(stop)
    mask = (
        place[None, :] // size <= place[:, None] // size if clean == "block_causal" else place[None] <= place[:, None]
    )
    mask = torch.where(place[:, None] >= first, torch.ones_like(mask), mask)  # the noised block sees the prefix, itself
    mask = mask & ((place[None, :] < first) | (place[:, None] >= first))
    monkeypatch.setattr(reference, "visible_mask", lambda *unused: mask[None])
    hidden = model(torch.cat((x_0[:first], x_t[first:stop]))[None])[0, first:]
    monkeypatch.undo()
    logits = model.logits(hidden, excluded_ids=frozenset((MASK,)))
    return torch.nn.functional.cross_entropy(logits, x_0[first:stop], reduction="none")


@pytest.mark.multiprocess
@pytest.mark.promise("the block-diffusion loss is that of each noised block after its clean prefix alone")
@pytest.mark.parametrize("clean", ["block_causal", "token_causal"])
def test_loss_is_that_of_each_block_after_its_clean_prefix(build, monkeypatch, clean) -> None:
    joint = 0.3 if clean == "token_causal" else None
    goal, given = objective(clean_half=clean, diffusion_weight=joint), samples()
    rows, model = goal.rows(given, STEP, KEY), cases.reference(SPEC)
    total, nll, num_nll = 0.0, 0.0, 0
    for row in range(8):
        x_0, x_t = given.tokens[row], rows.inputs[row, :LENGTH]
        for first in range(0, LENGTH, 8):
            with torch.no_grad():
                costs = block_costs(monkeypatch, model, x_0, x_t, first, 8, clean)
            scored = rows.is_scored[row, first : first + 8]
            total += float((costs * rows.weight[row, first : first + 8])[scored].sum())
        for i in range(1, LENGTH) if joint else ():
            if given.is_eligible[row, i]:
                with torch.no_grad():
                    logits = model.logits(model(x_0[None, :i], Context(pattern=Causal()))[0, -1])
                logits[MASK] = -math.inf
                nll, num_nll = nll - float(torch.log_softmax(logits, dim=-1)[x_0[i]]), num_nll + 1
    engine = build(SPEC, goal=goal, micro_batch_size=2)
    report = cases.take_step(engine, STEP, learning_rate=0.0)
    nelbo = total / int(given.is_eligible.sum())
    assert report.nelbo_nats_per_token == pytest.approx(nelbo, rel=2e-5)
    if joint:
        assert report.loss_terms == pytest.approx({"nelbo": 0.3 * nelbo, "nll": nll / num_nll}, rel=2e-5)


def test_each_block_has_its_own_time_and_only_its_eligible_tokens_are_masked() -> None:
    goal, given = objective(), samples()
    rows = goal.rows(given, STEP, KEY)
    noised, clean = rows.inputs[:, :LENGTH], rows.inputs[:, LENGTH:]
    assert torch.equal(clean, given.tokens)
    assert torch.equal(noised == MASK, rows.is_scored[:, :LENGTH])
    assert not (rows.is_scored[:, :LENGTH] & ~given.is_eligible).any()
    assert not rows.is_scored[:, LENGTH:].any()
    weights = rows.weight[:, :LENGTH].reshape(8, 4, 8)
    assert all(len(set(block.tolist())) == 1 for row in weights for block in row)
    assert all(len({block[0].item() for block in row}) == 4 for row in weights)
    times = [detail["t"] for detail in goal.details(given, STEP, KEY)]
    for row, t in enumerate(times):
        for k in range(4):
            p = 1e-3 + (1 - 2e-3) * ((t + k * 0.6180339887498949) % 1)
            assert float(weights[row, k, 0]) == pytest.approx((1 - 2e-3) / p, rel=1e-5)
    whole = objective(block_time="sequence").rows(given, STEP, KEY)
    assert all(len(set(row.tolist())) == 1 for row in whole.weight[:, :LENGTH])


def test_block_grid_and_positions_restart_at_each_document() -> None:
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    context = doubled_context(objective(2)._pattern, tokens, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]]))
    assert context.positions is not None
    assert context.positions[0, :9].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert block_numbers(context.positions[:, :9], 2).tolist() == [[0, 0, 1, 2, 2, 3, 3, 4, 4]]


@pytest.mark.promise("block diffusion with blocks of one token is evaluated exactly")
def test_bound_of_blocks_of_one_token_is_the_exact_likelihood(monkeypatch) -> None:
    model, given = cases.reference(SPEC), samples(2)
    score = ReferenceScore(network=model, excluded_ids=frozenset((MASK,)))
    report = evaluate_rows(
        score,
        objective(1).bound,
        given.tokens,
        given.is_eligible,
        torch.arange(2),
        draws=3,
        replicates=3,
        key=KEY,
        batch_rows=2,
    )
    total = 0.0
    for row in range(2):
        for i in range(LENGTH):
            if given.is_eligible[row, i]:
                x_0 = given.tokens[row]
                with torch.no_grad():
                    total += float(
                        block_costs(monkeypatch, model, x_0, torch.full_like(x_0, MASK), i, 1, "block_causal")[0]
                    )
    assert report.nelbo_nats_per_token == pytest.approx(total / report.num_tokens, rel=1e-5)
    assert report.num_draws == 1


def test_bound_weighs_each_block_by_its_own_count_and_draws_every_count() -> None:
    given, seen = samples(8), set()

    def constant(rows: Rows) -> torch.Tensor:
        noised = rows.is_scored[:, :LENGTH].reshape(-1, 4, 8)
        seen.update(noised.sum(dim=2)[:, 0].tolist())
        return (2.0 * rows.weight * rows.is_scored).sum(dim=1)

    report = evaluate_rows(
        constant,
        objective().bound,
        given.tokens,
        given.is_eligible,
        torch.arange(8),
        draws=4,
        replicates=8,
        key=KEY,
        batch_rows=4,
    )
    assert report.nelbo_nats_per_token == pytest.approx(2.0)  # n/k * k * 2 nats in each block, for every mask
    assert seen == set(range(1, 9))


def test_decoding_finishes_a_block_before_the_next_and_refuses_text_behind_a_gap() -> None:
    goal, given = objective(4), samples(1)
    place = torch.arange(LENGTH)
    tokens = given.tokens.masked_fill(place >= 6, MASK)
    [found] = decode(
        ReferencePredictor(network=cases.reference(SPEC), vocabulary=VOCABULARY),
        goal.decoder,
        tokens,
        is_wanted=((place >= 6) & (place < 14))[None],
        options=DecodingOptions(num_denoising_steps=5),
    )
    blocks = [{i // 4 for i in step} for step in found.committed]
    assert all(len(block) == 1 for block in blocks)
    assert [min(block) for block in blocks] == sorted(min(block) for block in blocks)
    assert sorted(i for step in found.committed for i in step) == list(range(6, 14))
    with pytest.raises(UsageError, match="does not see the blocks after a gap"):
        goal.decoder.blocks(given.tokens[0], torch.tensor([3]), None)
    with pytest.raises(UsageError, match="--block-length is 8"):
        goal.decoder.blocks(tokens[0], torch.tensor([6]), 8)

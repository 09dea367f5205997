"""Next-token prediction against a plain network and a plain loop over positions."""

from __future__ import annotations

import pytest
import torch

from megamask.errors import UsageError
from megamask.evaluation.likelihood import evaluate_rows
from megamask.evaluation.reference_network import ReferenceScore
from megamask.generation.confidence import DecodingOptions, decode
from megamask.generation.predictor import ReferencePredictor
from megamask.models.context import Causal, Context
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import Samples
from megamask.objectives.given_first import GivenFirst
from support import engine_cases as cases

SPEC = cases.OPTIONS
VOCABULARY = cases.vocabulary(SPEC)
OBJECTIVE = AutoregressiveObjective(vocabulary=VOCABULARY, mask_logit="excluded")
STEP, KEY = 1, (cases.SEED, 0)


def samples(count: int = 8) -> Samples:
    share = cases.batch(list(range(count)), STEP)
    return Samples(
        tokens=share.tokens,
        is_eligible=share.is_eligible,
        sample_index=share.sample_index,
        batch_position=list(range(count)),
        global_batch_size=count,
    )


def plain_nll(model: torch.nn.Module, tokens: torch.Tensor, is_eligible: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum of -log p(x_i | x_<i): the network reads the prefix alone, so that nothing can leak."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, eligible in zip(tokens, is_eligible, strict=True):
        for i in range(1, len(row)):
            if eligible[i]:
                logits = model.logits(model(row[None, :i], Context(pattern=Causal()))[0, -1])
                logits[VOCABULARY.mask_token_id] = -torch.inf
                total = total - torch.log_softmax(logits.double(), dim=-1)[row[i]]
                count += 1
    return total, count


def test_all_tokens_but_a_rows_first_are_scored_and_no_target_is_the_mask() -> None:
    given = samples()
    rows = OBJECTIVE.rows(given, STEP, KEY)
    for row in range(8):
        scored = [i for i in range(cases.SEQUENCE_LENGTH) if rows.is_scored[row, i]]
        wanted = [i for i in range(1, cases.SEQUENCE_LENGTH) if given.is_eligible[row, i]]
        assert [i + 1 for i in scored] == wanted
        assert rows.targets[row, scored].tolist() == given.tokens[row, wanted].tolist()
    assert (
        OBJECTIVE.details(given, STEP, KEY)[1]["scored"] == given.is_eligible[1, 1:].nonzero().add(1).flatten().tolist()
    )
    assert not (rows.targets[rows.is_scored] == VOCABULARY.mask_token_id).any()


@pytest.mark.multiprocess
@pytest.mark.promise("the autoregressive loss is the negative log-likelihood of every token but a row's first")
def test_loss_and_gradients_are_those_of_a_plain_loop_over_prefixes(build) -> None:
    engine = build(SPEC, goal=OBJECTIVE, micro_batch_size=2, clip_grad_norm=0.0)
    model = cases.reference(SPEC)
    given = samples()
    total, count = plain_nll(model, given.tokens, given.is_eligible)
    report = cases.take_step(engine, STEP, learning_rate=0.0)
    assert report.loss == pytest.approx(float(total) / count, rel=1e-6)
    assert (report.scored_tokens, report.masked_tokens) == (count, 0)
    assert report.nelbo_nats_per_token == report.loss_terms["nll"] == report.loss
    (total / count).backward()
    for name, gradient in cases.canonical_gradients(engine).items():
        expected = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-7, msg=name)


@pytest.mark.promise("an autoregressive model is evaluated to its exact negative log-likelihood")
def test_bound_is_the_exact_likelihood_and_diffusion_can_score_the_same_tokens() -> None:
    model, given = cases.reference(SPEC), samples(3)
    score = ReferenceScore(network=model, excluded_ids=OBJECTIVE.excluded_ids)
    options = {"draws": 3, "replicates": 4, "key": KEY, "batch_rows": 2}
    report = evaluate_rows(score, OBJECTIVE.bound, given.tokens, given.is_eligible, torch.arange(3), **options)
    with torch.no_grad():
        total, count = plain_nll(model, given.tokens, given.is_eligible)
    assert report.nelbo_nats_per_token == pytest.approx(float(total) / count, rel=1e-6)
    assert (report.num_tokens, report.standard_error, report.num_draws) == (count, 0.0, 1)
    masked = GivenFirst(bound=cases.objective(spec=SPEC).bound)
    other = evaluate_rows(score, masked, given.tokens, given.is_eligible, torch.arange(3), **options)
    assert other.num_tokens == report.num_tokens


def test_row_of_one_token_costs_nothing() -> None:
    tokens, is_eligible = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.bool)
    is_eligible[1, 1:] = False
    score = ReferenceScore(network=cases.reference(SPEC), excluded_ids=OBJECTIVE.excluded_ids)
    for bound in (OBJECTIVE.bound, GivenFirst(bound=cases.objective(spec=SPEC).bound)):
        report = evaluate_rows(
            score, bound, tokens, is_eligible, torch.arange(2), draws=2, replicates=2, key=KEY, batch_rows=2
        )
        assert report.num_tokens == 7
        assert report.nelbo_nats_per_token > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_is_left_to_right_and_greedy_takes_the_argmax_of_the_prefix(temperature: float) -> None:
    model, given = cases.reference(SPEC), samples(2)
    place = torch.arange(cases.SEQUENCE_LENGTH)
    tokens = given.tokens.masked_fill(place >= 5, VOCABULARY.mask_token_id)
    found = decode(
        ReferencePredictor(network=model, vocabulary=VOCABULARY),
        OBJECTIVE.decoder,
        tokens,
        is_wanted=((place >= 5) & (place < 12)).expand_as(tokens),
        options=DecodingOptions(temperature=temperature, seed=4),
        sequences=(0, 1),
    )
    for row, decoded in enumerate(found):
        assert decoded.committed == [[i] for i in range(5, 12)]
        assert decoded.nfe == 7
        text = tokens[row, :5].tolist()
        for i in range(5, 12):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([text]), Context(pattern=Causal()))[0, -1])
            logits[[VOCABULARY.mask_token_id, VOCABULARY.pad_token_id]] = -torch.inf
            token = int(decoded.tokens[i])
            assert temperature > 0 or token == int(logits.argmax())
            text.append(token)
        assert decoded.tokens[12:].tolist() == tokens[row, 12:].tolist()


@pytest.mark.parametrize("wanted", [[0, 1], [3, 5], [3, 4]])
def test_gaps_that_it_cannot_fill_are_refused(wanted: list[int]) -> None:
    tokens = torch.arange(1, 9)
    tokens[wanted] = VOCABULARY.mask_token_id
    with pytest.raises(UsageError, match="does not see what follows a gap"):
        OBJECTIVE.decoder.blocks(tokens, torch.tensor(wanted), None)
    with pytest.raises(UsageError, match="--block-length is 4"):
        OBJECTIVE.decoder.blocks(tokens, torch.tensor(wanted), 4)

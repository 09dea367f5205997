"""Packed documents that do not see each other: each one costs what it would cost alone in its row."""

from __future__ import annotations

import itertools

import pytest
import torch

from megamask.evaluation.reference_network import ReferenceScore
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import Rows, Samples
from megamask.objectives.block import BlockObjective
from megamask.objectives.documents import document_numbers, places_in_documents
from megamask.objectives.masked import MaskedObjective
from support import engine_cases as cases

SPEC = cases.OPTIONS
VOCABULARY = cases.vocabulary(SPEC)
EOD, PAD, MASK = VOCABULARY.eod_token_id, VOCABULARY.pad_token_id, VOCABULARY.mask_token_id
KEY, STEP, LENGTH = (cases.SEED, 0), 1, 32
STARTS = (0, 11, 19, 30)  # of three documents and of the padding


def row() -> torch.Tensor:
    tokens = torch.randint(0, 50, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    tokens[0, [start - 1 for start in STARTS[1:]]] = EOD
    tokens[0, STARTS[-1] :] = PAD
    return tokens


def samples(tokens: torch.Tensor) -> Samples:
    return Samples(
        tokens=tokens,
        is_eligible=tokens != PAD,
        sample_index=torch.tensor([3]),
        batch_position=[0],
        global_batch_size=1,
    )


OBJECTIVES = {
    "masked": MaskedObjective(
        vocabulary=VOCABULARY,
        noise_schedule="linear",
        complementary=True,
        mask_logit="excluded",
        isolate_documents=True,
    ),
    "block": BlockObjective(
        vocabulary=VOCABULARY, block_size=4, clean_half="block_causal", mask_logit="excluded", isolate_documents=True
    ),
    "joint": BlockObjective(
        vocabulary=VOCABULARY,
        block_size=4,
        clean_half="token_causal",
        mask_logit="excluded",
        diffusion_weight=0.3,
        isolate_documents=True,
    ),
    "autoregressive": AutoregressiveObjective(vocabulary=VOCABULARY, mask_logit="excluded", isolate_documents=True),
}


def test_documents_are_numbered_by_their_end_and_places_restart() -> None:
    numbers = document_numbers(row(), VOCABULARY)[0]
    for number, (start, stop) in enumerate(itertools.pairwise((*STARTS, LENGTH))):
        assert set(numbers[start:stop].tolist()) == {number if number < 3 else LENGTH}
        assert places_in_documents(numbers[None])[0, start:stop].tolist() == list(range(stop - start))


@pytest.mark.promise("with isolated documents each document costs what it costs alone")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_documents_cost_what_they_cost_alone(name: str) -> None:
    objective, score = OBJECTIVES[name], ReferenceScore(network=cases.reference(SPEC), excluded_ids=frozenset((MASK,)))
    given = samples(row())
    rows = objective.rows(objective.seen(given, KEY), STEP, KEY)
    packed = float(score(rows).sum())
    alone = 0.0
    for start, stop in itertools.pairwise(STARTS):
        columns = torch.arange(start, stop)
        doubled = torch.cat((columns, columns + LENGTH)) if rows.inputs.size(1) == 2 * LENGTH else columns
        one = samples(given.tokens[:, columns])
        alone_context = objective.context(one, STEP, KEY)
        alone += float(
            score(
                Rows(
                    inputs=rows.inputs[:, doubled],
                    targets=rows.targets[:, doubled],
                    is_scored=rows.is_scored[:, doubled],
                    weight=rows.weight[:, doubled],
                    group=rows.group[:, doubled],
                    context=alone_context,
                )
            ).sum()
        )
        assert alone_context.documents is None
    assert packed == pytest.approx(alone, rel=1e-5)
    if name == "autoregressive":
        assert not rows.is_scored[0, [start - 1 for start in STARTS[1:]]].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bound_and_record_know_of_isolation(name: str) -> None:
    objective, tokens = OBJECTIVES[name], row()
    assert objective.record()["isolate_documents"] is True
    is_scored = objective.bound.scored(tokens, tokens != PAD)
    drawn = objective.bound.draw(
        tokens, is_scored, torch.tensor([0]), replicate=0, member=0, draws=1, key=KEY
    ).rows.context
    assert drawn.documents is not None
    assert drawn.documents[0, :LENGTH].tolist() == document_numbers(tokens, VOCABULARY)[0].tolist()
    assert int(is_scored.sum()) == (30 - 3 if name == "autoregressive" else 30)

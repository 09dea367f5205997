"""Masked diffusion as an objective: views, choices that do not exist, and its record."""

from __future__ import annotations

import pytest
import torch

from megamask.config.schema.objective import ObjectiveConfig
from megamask.errors import UsageError
from megamask.objectives.base import Samples
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.registry import build_objective, build_phases
from megamask.objectives.schedule import phases_of
from support.model_documents import model_document
from support.objectives import masked_objective

VOCABULARY = model_document().vocabulary


def _samples(num: int = 4, length: int = 32) -> Samples:
    generator = torch.Generator().manual_seed(5)
    return Samples(
        tokens=torch.randint(0, 23, (num, length), generator=generator),
        is_eligible=torch.rand(num, length, generator=generator) < 0.9,
        sample_index=torch.arange(100, 100 + num),
        batch_position=list(range(num)),
        global_batch_size=num,
    )


def test_objective_counts_its_views() -> None:
    pair, single = (masked_objective(VOCABULARY, complementary=choice) for choice in (True, False))
    assert (pair.shape(16).num_views, single.shape(16).num_views) == (2, 1)
    assert (pair.shape(16).scored_positions, single.shape(16).scored_positions) == (16, 16)


def test_rows_of_a_pair_score_each_eligible_token_once_and_nothing_else() -> None:
    samples = _samples()
    rows = masked_objective(VOCABULARY).rows(samples, 3, (1, 0))
    assert rows.inputs.shape == (8, 32)
    first, second = rows.is_scored[::2], rows.is_scored[1::2]
    assert torch.equal(first ^ second, samples.is_eligible)
    assert torch.equal(rows.inputs == VOCABULARY.mask_token_id, rows.is_scored)
    assert torch.equal(rows.targets[::2], samples.tokens)
    assert bool((rows.group >= 0).all())


def test_details_name_the_first_views_masks() -> None:
    objective, samples = masked_objective(VOCABULARY), _samples()
    rows = objective.rows(samples, 3, (1, 0))
    details = objective.details(samples, 3, (1, 0))
    assert [detail["masked"] for detail in details] == [row.nonzero().flatten().tolist() for row in rows.is_scored[::2]]
    assert sorted(detail["t"] for detail in details) == pytest.approx(
        [min(detail["t"] for detail in details) + j / 4 for j in range(4)]
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noise_schedule": "square"}, "objective.noise_schedule is 'square'; allowed: linear"),
        ({"mask_logit": "some"}, "objective.mask_logit is 'some'; allowed: excluded, included"),
    ],
)
def test_objective_refuses_what_does_not_exist(changed: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        masked_objective(VOCABULARY, **changed)


def test_record_reads_back_as_the_same_objective_and_a_record_without_a_name_is_masked() -> None:
    objective = masked_objective(VOCABULARY, noise_schedule="cosine_md4", complementary=False)
    record = objective.record()
    assert build_objective(record, VOCABULARY) == objective
    del record["name"]
    assert build_objective(record, VOCABULARY) == objective
    with pytest.raises(UsageError, match=r"objective\.name is 'other'; allowed: masked"):
        build_objective({"name": "other"}, VOCABULARY)


def test_config_section_makes_the_objective() -> None:
    phases = phases_of(ObjectiveConfig(z_loss_weight=0.5).settings(), 16, lambda amount, unit: amount + 1)
    objective = build_phases(phases, VOCABULARY)
    assert objective == MaskedObjective(
        vocabulary=VOCABULARY, noise_schedule="linear", complementary=True, mask_logit="excluded", z_loss_weight=0.5
    )
    assert [term.name for term in objective.terms] == ["nelbo", "z_loss"]

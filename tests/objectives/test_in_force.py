"""A network has the bound, decoder and record of the step that it was trained up to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamask.errors import UsageError
from megamask.objectives.base import Samples
from megamask.objectives.block import BlockDecoder, BlockObjective
from megamask.objectives.in_force import at_step, bound_record, each_in_force, first_steps, newest_pair, probed
from megamask.objectives.masked import MaskedBound, MaskedObjective
from megamask.objectives.phased import PhasedObjective
from megamask.objectives.registry import build_objective
from megamask.objectives.shifted import Shifted
from megamask.objectives.warm_start import eased
from support.model_documents import model_document

VOCABULARY = model_document().vocabulary
BLOCK = BlockObjective(vocabulary=VOCABULARY, block_size=4, clean_half="block_causal", mask_logit="excluded")
MASKED = MaskedObjective(vocabulary=VOCABULARY, noise_schedule="linear", complementary=True, mask_logit="excluded")
PHASED = PhasedObjective(phases=((1, replace(BLOCK, block_size=1)), (3, MASKED), (6, BLOCK)))
PAIR_ENDS = PhasedObjective(phases=((1, MASKED), (5, replace(MASKED, complementary=False))))


@pytest.mark.promise("the validation bound is that of the phase in force at its step, and recorded with it")
def test_bound_is_that_of_the_phase_in_force() -> None:
    assert at_step(PHASED, 0).bound == at_step(PHASED, 2).bound == replace(BLOCK, block_size=1).bound
    assert at_step(PHASED, 2).bound.is_exact
    assert isinstance(at_step(PHASED, 3).bound, MaskedBound) and isinstance(at_step(PHASED, 5).bound, MaskedBound)
    assert at_step(PHASED, 6).bound == BLOCK.bound and isinstance(at_step(PHASED, 99).decoder, BlockDecoder)
    assert [bound_record(PHASED, step) for step in (0, 2, 3, 5, 6)] == [
        {"objective": {"name": "block", "block_size": 1}, "bound_from_step": 1},
        {"objective": {"name": "block", "block_size": 1}, "bound_from_step": 1},
        {"objective": {"name": "masked"}, "bound_from_step": 3},
        {"objective": {"name": "masked"}, "bound_from_step": 3},
        {"objective": {"name": "block", "block_size": 4}, "bound_from_step": 6},
    ]


def test_phases_of_one_kind_of_bound_are_compared() -> None:
    """The end of the pair changes what is trained, not what the bound is of."""
    assert first_steps(PAIR_ENDS) == [1, 5]
    assert bound_record(PAIR_ENDS, 2) == bound_record(PAIR_ENDS, 7) == bound_record(MASKED, 2) == {}
    grows_back = PhasedObjective(phases=((1, BLOCK), (3, MASKED), (4, replace(MASKED, complementary=False))))
    assert [bound_record(grows_back, step)["bound_from_step"] for step in (2, 3, 4, 9)] == [1, 3, 3, 3]


def test_a_target_shift_that_ends_changes_the_kind() -> None:
    objective = eased(PAIR_ENDS, shift=3, attention_annealing_steps=2)
    assert first_steps(objective) == [1, 4, 5]
    assert each_in_force(objective) == [Shifted(inner=MASKED), MASKED, replace(MASKED, complementary=False)]
    assert bound_record(objective, 3) == {"objective": {"name": "masked", "target_shift": True}, "bound_from_step": 1}
    assert bound_record(objective, 5) == {"objective": {"name": "masked"}, "bound_from_step": 4}


@pytest.mark.promise("a checkpoint's record has every phase, so that it is read as the phase it was trained in")
@pytest.mark.parametrize("objective", [PHASED, PAIR_ENDS, eased(PHASED, shift=4), eased(PHASED, shift=True)])
def test_record_gives_the_phases_back(objective) -> None:
    again = build_objective(objective.record(), VOCABULARY)
    assert again.record() == objective.record()
    for step in range(1, 8):
        assert at_step(again, step) == at_step(objective, step)


@pytest.mark.parametrize("phases", [[], [{"first_step": 2, **BLOCK.record()}], [{"first_step": 1, **MASKED.record()}]])
def test_record_with_other_phases_than_it_names_is_refused(phases) -> None:
    with pytest.raises(UsageError, match="phases"):
        build_objective({**BLOCK.record(), "phases": phases}, VOCABULARY)


def test_pair_and_blocks_are_measured_in_the_phase_that_has_them() -> None:
    assert newest_pair(PAIR_ENDS, 3) == newest_pair(PAIR_ENDS, 9) == MASKED
    assert newest_pair(eased(PAIR_ENDS, shift=True), 9) == Shifted(inner=MASKED)
    with pytest.raises(ValueError, match="pair"):
        newest_pair(BLOCK, 1)
    assert probed(PHASED, 7) == BLOCK and probed(PHASED, 4) is None


def test_probe_of_shifted_blocks_scores_each_token_one_position_earlier() -> None:
    given = Samples(
        tokens=torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(1)),
        is_eligible=torch.ones(2, 16, dtype=torch.bool),
        sample_index=torch.arange(2),
        batch_position=[0, 1],
        global_batch_size=2,
    )
    shifted, plain = probed(Shifted(inner=BLOCK), 1), probed(BLOCK, 1)
    assert shifted is not None and plain is not None
    one, other = (each.probe(given, 1, (3, 0), block=torch.tensor([1, 2])) for each in (shifted, plain))
    assert torch.equal(one.rows.is_scored[:, :15], other.rows.is_scored[:, 1:16])
    assert torch.equal(one.rows.targets[one.rows.is_scored], other.rows.targets[other.rows.is_scored])

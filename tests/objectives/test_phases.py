"""Phases of an objective: functions of the config alone, one shape inside a phase, the clean half dropped at L."""

from __future__ import annotations

import pytest
import torch

from megamask.config.load import load_train_config
from megamask.config.validate import validate_train
from megamask.errors import UsageError
from megamask.objectives.base import Samples
from megamask.objectives.phased import PhasedObjective
from megamask.objectives.registry import build_phases
from megamask.objectives.schedule import at_step, largest_shape
from megamask.training.batch_size import consumed_before, first_step
from megamask.training.run_data import objective_phases
from support.command import TINY
from support.model_documents import model_document

VOCABULARY = model_document().vocabulary
LENGTH = 128


def config(*settings: str):
    loaded = load_train_config(TINY, list(settings))
    validate_train(loaded.config, loaded.origins)
    return loaded.config


BLOCK = "objective.name=block"


def test_phases_follow_the_schedule_by_steps() -> None:
    phases = objective_phases(config(BLOCK, "objective.block_schedule=[0:1,5:4,8:L,12:32]"))
    assert [first for first, _ in phases] == [1, 6, 9, 13]
    names = [(settings["name"], settings.get("block_size")) for _, settings in phases]
    assert names == [("block", 1), ("block", 4), ("masked", None), ("block", 32)]
    assert at_step(phases, 8)["block_size"] == 4 and at_step(phases, 100)["block_size"] == 32
    assert largest_shape(phases, LENGTH).input_length == 2 * LENGTH
    objective = build_phases(phases, VOCABULARY)
    assert isinstance(objective, PhasedObjective)
    assert [objective.at(step).shape(LENGTH).input_length for step in (1, 8, 9, 12, 13)] == [256, 256, 128, 128, 256]
    assert {**objective.record(), "phases": None} == {**objective.at(13).record(), "phases": None}


@pytest.mark.promise("the phase of one block a row is masked diffusion without the clean half, on the same masks")
def test_phase_of_one_block_masks_as_one_block_would() -> None:
    one = objective_phases(config(BLOCK, "objective.block_schedule=[0:L]"))[0][1]
    full = objective_phases(config(BLOCK, f"objective.block_size={LENGTH}"))[0][1]
    given = Samples(
        tokens=torch.randint(0, 20, (8, LENGTH), generator=torch.Generator().manual_seed(1)),
        is_eligible=torch.ones(8, LENGTH, dtype=torch.bool),
        sample_index=torch.arange(8),
        batch_position=list(range(8)),
        global_batch_size=8,
    )
    dropped, doubled = (build_phases([(1, s)], VOCABULARY).rows(given, 1, (3, 0)) for s in (one, full))
    assert torch.equal(dropped.inputs, doubled.inputs[:, :LENGTH])
    assert torch.equal(dropped.is_scored, doubled.is_scored[:, :LENGTH])
    torch.testing.assert_close(dropped.weight, doubled.weight[:, :LENGTH])


@pytest.mark.parametrize(
    "ramp",
    [
        (),
        (
            "training.batch_size_ramp_start=2",
            "training.batch_size_ramp_increment=2",
            "training.batch_size_ramp_samples=40",
        ),
    ],
)
def test_starts_in_tokens_are_the_first_step_that_begins_there(ramp: tuple[str, ...]) -> None:
    training = config(*ramp).training
    for tokens in (1, 128, 129, 1024, 5000, 12345):
        step = first_step(tokens, "tokens", training)
        assert consumed_before(step, training) * LENGTH >= tokens
        assert step == 1 or consumed_before(step - 1, training) * LENGTH < tokens
    phases = objective_phases(config(*ramp, "objective.complementary_until_tokens=5000"))
    assert [(first, settings["complementary"]) for first, settings in phases] == [
        (1, True),
        (first_step(5000, "tokens", training), False),
    ]
    both = objective_phases(
        config(
            BLOCK,
            "objective.complementary=true",
            "objective.complementary_until_tokens=5000",
            "objective.block_schedule=[0:1,2048:8]",
            "objective.block_schedule_unit=tokens",
            *ramp,
        )
    )
    assert [settings["block_size"] for _, settings in both] == [1, 8, 8]
    assert [settings["complementary"] for _, settings in both] == [True, True, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((BLOCK, "objective.block_schedule=[0:1,5:x]"), "where '5:x' is not an entry"),
        ((BLOCK, "objective.block_schedule=[1:1]"), "whose starts are 1"),
        ((BLOCK, "objective.block_schedule=[0:1,5:2,5:4]"), "whose starts are 0, 5, 5"),
        (
            (BLOCK, "objective.block_schedule=[0:256]"),
            "a block of 256 tokens does not fit",
        ),
        (
            (BLOCK, "objective.block_schedule=[0:1]", "objective.block_size=8"),
            "block_schedule gives the sizes",
        ),
        ((BLOCK, "objective.block_schedule=[0:1,9:L]", "objective.forced_mask=true"), "has a phase of one block a row"),
        ((BLOCK, "objective.clip_low=0.6", "objective.clip_high=0.5"), "objective.clip_low is 0.6"),
        (("objective.complementary=false", "objective.complementary_until_tokens=9"), "there is no pair to end"),
        (("objective.block_schedule=[0:1]",), "for which this key has no meaning"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        config(*settings)
    assert words in caught.value.message

"""Facts of a run's steps that run.json states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megamask.audit.rules import rules_of
from megamask.runs.record import read_run


@pytest.mark.parametrize(
    ("setting", "source_shifts", "shifted"),
    [("keep", True, [1, 2, 3]), ("keep", False, []), ("drop", True, []), ("{until_step: 2}", True, [1, 2])],
)
def test_shift_of_a_step_is_that_of_the_source_as_far_as_the_config_keeps_it(
    run_dir: Path, setting: str, source_shifts: bool, shifted: list[int]
) -> None:
    record = read_run(run_dir)
    identity = record.content["identity"] | {"initialise.shift": setting}
    content = record.content | {"identity": identity, "parent_checkpoint": {"target_shift": source_shifts}}
    rules = rules_of(replace(record, content=content), {})
    assert [step for step in (1, 2, 3) if rules.has_shift(step)] == shifted
    assert not rules_of(record, {}).has_shift(1), "a run without a source"

"""Reasons to stop and their agreement."""

from __future__ import annotations

import pytest

from megamask.errors import ExitCode
from megamask.training.stopping import CutShort, StopFlag, StopReason


class Ranks:
    """This rank's collective when the other ranks see `others`."""

    def __init__(self, others: int = 0) -> None:
        self.others = others

    def max_over_ranks(self, value: int) -> int:
        return max(value, self.others)


class Signals:
    def __init__(self, requested: int = 0) -> None:
        self.requested = requested


def flag(
    *, signals: int = 0, others: int = 0, superseded: bool = False, stop_after: int | None = None, steps: int = 10
) -> StopFlag:
    return StopFlag(
        Ranks(others),
        signals=Signals(signals),
        is_superseded=lambda: superseded,
        num_steps=steps,
        stop_after_step=stop_after,
    )


@pytest.mark.parametrize(
    ("stop", "step", "reason"),
    [
        (flag(), 9, StopReason.NONE),
        (flag(), 10, StopReason.FINISHED),
        (flag(stop_after=4), 3, StopReason.NONE),
        (flag(stop_after=4), 4, StopReason.STOP_AFTER_STEP),
        (flag(stop_after=4), 7, StopReason.STOP_AFTER_STEP),
        (flag(signals=75), 3, StopReason.PREEMPTED),
        (flag(signals=93), 3, StopReason.OPERATOR),
        (flag(superseded=True), 3, StopReason.SUPERSEDED),
    ],
)
def test_reason_follows_from_what_this_rank_sees(stop: StopFlag, step: int, reason: StopReason) -> None:
    assert stop.agreed(step) is reason


def test_one_rank_s_signal_stops_every_rank() -> None:
    assert flag(others=int(StopReason.PREEMPTED)).agreed(3) is StopReason.PREEMPTED


@pytest.mark.parametrize("stop", [flag(signals=75), flag(signals=93), flag(superseded=True), flag(others=1)])
def test_measurement_is_cut_short_on_every_rank_by_a_signal_or_a_newer_attempt(stop: StopFlag) -> None:
    with pytest.raises(CutShort):
        stop.check()


def test_measurement_goes_on_while_nothing_asks_for_an_end() -> None:
    flag(stop_after=1).check()


def test_measurement_cut_short_at_the_last_step_asks_for_a_requeue() -> None:
    stop = flag(signals=75)
    with pytest.raises(CutShort):
        stop.check()
    assert stop.agreed(10) is StopReason.PREEMPTED


def test_a_signal_at_the_last_step_does_not_ask_for_a_requeue() -> None:
    assert flag(signals=75).agreed(10) is StopReason.FINISHED


def test_a_newer_attempt_wins_over_everything() -> None:
    assert flag(superseded=True, signals=93).agreed(10) is StopReason.SUPERSEDED


@pytest.mark.parametrize(
    ("reason", "code", "phase"),
    [
        (StopReason.FINISHED, ExitCode.DONE, "done"),
        (StopReason.STOP_AFTER_STEP, ExitCode.DONE, "stopped"),
        (StopReason.PREEMPTED, ExitCode.PREEMPTED, "preempted"),
        (StopReason.OPERATOR, ExitCode.DO_NOT_REQUEUE, "stopped"),
        (StopReason.SUPERSEDED, ExitCode.DO_NOT_REQUEUE, "stopped"),
    ],
)
def test_reason_maps_to_the_contract(reason: StopReason, code: ExitCode, phase: str) -> None:
    assert (reason.exit_code, reason.phase) == (code, phase)
    assert reason.description

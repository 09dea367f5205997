from __future__ import annotations

import itertools

import pytest

from megamask.errors import ExitCode
from megamask.resilience.exit_codes import PRECEDENCE, combine


def test_precedence_is_the_published_one() -> None:
    assert PRECEDENCE == (66, 65, 64, 2, 93, 74, 70, 17, 16, 71, 1)


def test_more_specific_code_wins_for_every_pair() -> None:
    for first, second in itertools.combinations(PRECEDENCE, 2):
        assert combine([second, 0, first]) == combine([first, second, 75]) == first


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([75, 75], 75),
        ([75, 1], 1),  # one rank did not save: a crash, for any codes of the others
        ([75, -9], 1),
        ([75, 93], 93),
        ([-15, 66, -15], 66),  # the others were ended by the launcher
        ([137], 1),
        ([-11, 0], 1),
        ([3], 1),  # not a code of the contract
        ([255, 64], 64),
        ([130, 130], 130),
        ([130, -9], 130),  # the operator ended it; the rest died of the launcher's signal
        ([130, 1], 1),
        ([130, 75], 130),
    ],
)
def test_combined_code(codes: list[int], expected: int) -> None:
    assert combine(codes) == expected


def test_every_code_of_the_contract_survives_alone() -> None:
    for code in ExitCode:
        assert combine([code, 0]) == code

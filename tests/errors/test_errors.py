from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from megamask import errors
from megamask.errors import ExitCode, MegamaskError, error_with_code

KINDS = {
    "UsageError": 2,
    "DataIntegrityError": 64,
    "CheckpointIntegrityError": 65,
    "NumericsError": 66,
    "StorageError": 74,
    "SupersededError": 93,
}


def test_exit_codes_are_the_contracts():
    assert [int(code) for code in ExitCode] == [0, 1, 2, 16, 17, 64, 65, 66, 70, 71, 74, 75, 93, 130]


@pytest.mark.parametrize("name", KINDS)
def test_typed_error_carries_its_exit_code_message_and_hint(name):
    kind = getattr(errors, name)
    error = kind("what happened", hint="what to do")
    assert int(error.exit_code) == KINDS[name]
    assert (error.message, error.hint) == ("what happened", "what to do")
    assert str(error) == "what happened\nhint: what to do"
    assert str(kind("what happened")) == "what happened"


def test_no_two_kinds_of_error_share_an_exit_code():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MegamaskError)]
    assert {kind.__name__ for kind in kinds} == {"MegamaskError", *KINDS}
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    assert MegamaskError.exit_code is ExitCode.BUG


def test_exit_codes_are_documented_in_the_architecture():
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    for code in ExitCode:
        assert str(int(code)) in text


@pytest.mark.parametrize("name", KINDS)
def test_error_of_another_process_has_the_type_of_its_code(name):
    error = error_with_code(KINDS[name], "what happened", hint="what to do")
    assert type(error) is getattr(errors, name)
    assert (int(error.exit_code), error.message, error.hint) == (KINDS[name], "what happened", "what to do")


def test_error_of_a_code_without_a_type_of_its_own_keeps_the_code():
    assert error_with_code(70, "x").exit_code is ExitCode.HARDWARE
    assert MegamaskError("y").exit_code is ExitCode.BUG

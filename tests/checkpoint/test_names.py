from __future__ import annotations

import pytest

from megamask.checkpoint.names import folder_name, is_plain_name, parse_folder_name


def test_folder_name_reads_back_and_sorts_like_its_numbers() -> None:
    places = [(0, 1), (9, 2), (200, 1), (200, 12), (99_999_999, 1)]
    names = [folder_name(*place) for place in places]
    assert names[2] == "step-00000200-a0001"
    assert names == sorted(names)
    assert [parse_folder_name(name) for name in names] == places


def test_folder_name_reads_back_when_numbers_outgrow_their_padding() -> None:
    assert parse_folder_name(folder_name(123_456_789, 12_345)) == (123_456_789, 12_345)


@pytest.mark.parametrize(
    "name", ["step-200-a0001", "step-000000200-a0001", "step-00000200", "step-00000200-a0001.tmp", "latest", ""]
)
def test_folder_name_refuses_what_it_never_writes(name: str) -> None:
    assert parse_folder_name(name) is None


@pytest.mark.parametrize("name", ["state.json", "tokenizer/tokenizer.json", "state-00000.safetensors"])
def test_plain_names_are_accepted(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../b", "/etc/passwd", "a//b", "./a", "a/", "a\\b", "a\0b", "a\nb"]
)
def test_names_that_leave_the_folder_or_have_two_spellings_are_refused(name: str) -> None:
    assert not is_plain_name(name)

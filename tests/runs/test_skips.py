"""skips.json: what is written is read back, and nothing else is taken for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.skips import Rewind, read_rewinds, rewinds_before, write_rewinds
from megamask.storage.documents import encode_document

FIRST = Rewind(attempt=1, step=9, back_to_step=4, first_sample=32, end_sample=72, rule="not_finite")
SECOND = Rewind(attempt=3, step=12, back_to_step=11, first_sample=128, end_sample=136, rule="loss")


def test_document_is_read_back_and_a_run_without_one_has_no_rewinds(tmp_path: Path) -> None:
    assert read_rewinds(tmp_path) == []
    write_rewinds(tmp_path, "run", [FIRST, SECOND])
    assert read_rewinds(tmp_path) == [FIRST, SECOND]
    assert rewinds_before([FIRST, SECOND], 1) == []
    assert rewinds_before([FIRST, SECOND], 3) == [FIRST]


def test_rewind_withdraws_what_earlier_attempts_did_after_its_step() -> None:
    places = {(step, attempt) for step in (4, 5) for attempt in (1, 2)}
    assert {place for place in places if FIRST.withdraws(step=place[0], attempt=place[1])} == {(5, 1)}


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["rewinds"].clear(),
        lambda document: document["rewinds"][0].pop("rule"),
        lambda document: document["rewinds"][0].update(end_sample=32),
        lambda document: document["rewinds"][0].update(back_to_step=9),
        lambda document: document["rewinds"][0].update(first_sample=-1),
        lambda document: document["rewinds"][1].update(attempt=1),
        lambda document: document["laws"].update(order=1),
    ],
)
def test_document_that_states_nonsense_is_damaged(tmp_path: Path, change: Callable[[Any], object]) -> None:
    from megamask.runs.skips import SKIPS

    write_rewinds(tmp_path, "run", [FIRST, SECOND])
    document = json.loads((tmp_path / "skips.json").read_text())
    change(document)
    content = {key: document[key] for key in document.keys() - {"format", "version", "self_sha256"}}
    (tmp_path / "skips.json").write_bytes(encode_document(SKIPS, content))
    with pytest.raises(CheckpointIntegrityError, match="lacks or misstates a field"):
        read_rewinds(tmp_path)


def test_changed_digit_and_a_newer_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "skips.json"
    write_rewinds(tmp_path, "run", [FIRST])
    path.write_bytes(path.read_bytes().replace(b"72", b"80"))
    with pytest.raises(CheckpointIntegrityError, match="does not have the sha256"):
        read_rewinds(tmp_path)
    path.write_text('{"format": "megamask-skips", "version": 2}')
    with pytest.raises((CheckpointIntegrityError, UsageError)):
        read_rewinds(tmp_path)

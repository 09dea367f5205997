"""Typed records of the journal: the names in its JSON, what a line may lack, and the page that describes them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from megamask.tracking.records import ENVELOPE, RECORDS, RecordError, Step, read_record

FORMATS = Path(__file__).parents[2] / "docs" / "formats.md"


def test_record_reads_back_as_it_was_written() -> None:
    step = Step(step=3, loss=2.5, loss_terms={"nelbo": 2.5}, masked_tokens=7)
    assert Step.from_json(step.to_json()) == step


def test_numbers_that_are_not_finite_are_floats() -> None:
    record = read_record({"kind": "step", "step": 1, "loss": "nan", "loss_terms": {"nelbo": "-inf"}})
    assert isinstance(record, Step)
    assert record.loss is not None and math.isnan(record.loss)
    assert record.loss_terms == {"nelbo": -math.inf}


def test_text_that_reads_like_a_number_stays_text() -> None:
    record = read_record({"kind": "incident", "incident": "nan", "problem": "inf"})
    assert record is not None
    assert record.to_json()["problem"] == "inf"


@pytest.mark.parametrize("loss", [True, "2.5", [2.5]])
def test_field_of_another_type_counts_as_missing_unless_the_reader_is_strict(loss: object) -> None:
    line = {"kind": "step", "step": 1, "loss": loss}
    record = read_record(line)
    assert isinstance(record, Step)
    assert record.loss is None
    with pytest.raises(RecordError, match="loss"):
        read_record(line, is_strict=True)


@pytest.mark.parametrize("step", [None, "1", True, 1.0])
def test_line_without_its_step_is_not_a_record(step: object) -> None:
    assert read_record({"kind": "step", "step": step}) is None


def test_unknown_kinds_and_fields_are_ignored() -> None:
    assert read_record({"kind": "of_tomorrow"}) is None
    assert read_record({"kind": "step", "step": 1, "of_tomorrow": 2}) == Step(step=1)


@pytest.mark.promise("docs/formats.md names every field of every journal line")
def test_fields_on_the_page_are_those_of_the_records() -> None:
    page = FORMATS.read_text(encoding="utf-8")
    section = page[page.index("### Journal") : page.index("### tracking/mlflow.json")]
    kinds, incidents = section[: section.index("A `step` record:")], section[section.index("The incidents and") :]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", kinds, flags=re.MULTILINE)
    described = {name: set(re.findall(r"`([a-z_0-9]+)`", text)) for name, text in rows}
    described["incident"] |= set(re.findall(r"`([a-z_0-9]+)`", incidents))
    step_fields = section[section.index("A `step` record:") :]
    described["step"] = set(re.findall(r"`([a-z_0-9]+)`", step_fields))
    for kind, record in RECORDS.items():
        names = {name for name in record.__dataclass_fields__ if name not in ENVELOPE}
        assert names - described[kind] == set(), kind

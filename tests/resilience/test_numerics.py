from __future__ import annotations

import math

import pytest

from megamask.errors import ExitCode
from megamask.resilience.numerics import describe, incident_fields, numerics_error


@pytest.mark.parametrize(
    ("loss", "grad_norm", "expected"),
    [
        (math.nan, 1.0, "the loss is nan;"),
        (1.0, math.inf, "the gradient norm is inf;"),
        (math.nan, -math.inf, "the loss is nan and gradient norm is -inf;"),
        (1.0, 1.0, "the step is not finite;"),
    ],
)
def test_description_names_what_is_not_finite(loss: float, grad_norm: float, expected: str) -> None:
    sentence = describe(step=7, loss=loss, grad_norm=grad_norm, sample_indices=[4, 5, 6, 9])
    assert sentence == f"step 7: {expected} samples 4-6, 9"


def test_numerics_error_says_what_did_not_happen() -> None:
    error = numerics_error(step=7, loss=math.nan, grad_norm=math.nan, sample_indices=range(8))
    assert error.exit_code == ExitCode.NUMERICS
    assert "samples 0-7" in error.message
    assert "nothing was saved" in error.message
    assert "inspect" in str(error.hint)
    assert (error.incident["incident"], error.incident["sample_indices"]) == ("not_finite", list(range(8)))


def test_incident_holds_every_sample_index_while_the_sentence_stays_short() -> None:
    indices = list(range(0, 4000, 2))
    fields = incident_fields(step=1, loss=math.nan, grad_norm=0.0, sample_indices=indices)
    assert fields["sample_indices"] == indices
    assert len(fields["problem"]) < 200
    assert fields["problem"].endswith(", ...")

"""The comparison of layouts finds faults: each of seven is planted, and the same comparison passes without it."""

from __future__ import annotations

import pytest

from support import parity_cases as parity
from support import planted_faults as planted
from support.gloo import run_gloo

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(900)]

ENDS = "first chunk for every virtual stage"
THREE = "positions of a middle stage dropped"
TWO = [name for name in planted.FAULTS if name not in (ENDS, THREE)]


@pytest.fixture(scope="module")
def single() -> dict:
    kinds = ["dense", "moe", "packed"]
    return dict(zip(kinds, run_gloo(1, planted.__file__, "single", kinds=kinds)[0], strict=True))


@pytest.fixture(scope="module")
def reports() -> dict:
    found = dict(zip(TWO, run_gloo(2, planted.__file__, "run", faults=TWO)[0], strict=True))
    return found | {THREE: run_gloo(3, planted.__file__, "run", faults=[THREE])[0][0]}


def agrees(found, expected) -> bool:
    difference = parity.differences(found, expected)
    return difference["is_exact"] and difference["loss"] < 1e-6 and difference["grad_norm"] < 1e-5


@pytest.mark.promise("a deliberate fault of a layout is found by the comparison with one process")
@pytest.mark.parametrize("fault", [*TWO, THREE])
def test_planted_fault_is_found_by_the_comparison_of_layouts(fault, reports, single):
    plain, faulty = reports[fault]
    expected = single[planted.FAULTS[fault][1]]
    assert agrees(plain, expected)
    assert not agrees(faulty, expected)


@pytest.mark.promise("a deliberate fault of a layout is found by the comparison with one process")
def test_first_chunk_for_every_stage_ends_the_step():
    with pytest.raises(AssertionError, match="only the last pipeline stage has a loss"):
        run_gloo(2, planted.__file__, "run", faults=[ENDS])

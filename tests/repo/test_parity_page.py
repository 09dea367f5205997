"""The page of the matrix of layouts shows what was measured, and no fault as a success."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SPEC = importlib.util.spec_from_file_location("parity_page", Path(__file__).parents[2] / "tools" / "parity_page.py")
assert SPEC is not None and SPEC.loader is not None
parity_page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(parity_page)

GOOD = {"loss": 2e-8, "grad_norm": 3e-7, "is_exact": True, "ranks_agree": True, "is_within": True, "flips": 0}
RESTART = {
    "is_equal": True,
    "other": "pp2",
    "is_same_state": True,
    "is_same_step": True,
    "loss": 1e-9,
    "largest_share": 0.5,
    "load_bytes": 2e6,
    "save_bytes": 1e6,
    "largest_tensor_bytes": 3e6,
}


def page_of(results: dict[str, Any]) -> str:
    return parity_page.page(
        results,
        ["tp2", "cp2"],
        ["dense", "recompute", "bf16"],
        tolerances={"dense": (1e-6, 1e-5), "recompute": (1e-6, 1e-5), "bf16": (1e-3, 2e-2)},
        bases={"recompute": "dense"},
        num_steps=20,
    )


def test_fault_is_never_shown_as_a_success() -> None:
    assert parity_page.cell(GOOD) == "2e-08 / 3e-07"
    assert parity_page.cell(GOOD | {"is_within": False}) == "2e-08 / 3e-07 OUT"
    assert parity_page.cell(GOOD | {"ranks_agree": False}) == "2e-08 / 3e-07 UNEQUAL"
    assert parity_page.cell(GOOD | {"is_exact": False, "is_within": False}) == "2e-08 / 3e-07 UNEQUAL"
    assert parity_page.cell(GOOD | {"flips": 3}) == "2e-08 / 3e-07, 3 flips"
    assert [parity_page.cell(result) for result in ({"failed": "it ended"}, {"refused": "no"}, None)] == [
        "FAILED",
        "R",
        "-",
    ]
    assert "| tp2 | NO |" in page_of({"restart/tp2": RESTART | {"is_equal": False}})


def test_page_states_tolerances_reasons_and_equal_bits() -> None:
    text = page_of(
        {
            "dense/tp2": GOOD | {"bits": "a"},
            "recompute/tp2": GOOD | {"bits": "a"},
            "dense/cp2": GOOD | {"bits": "b", "flips": 2},
            "recompute/cp2": GOOD | {"bits": "c"},
            "bf16/cp2": {"refused": "layout.context_parallel_size is 2"},
            "restart/tp2": RESTART,
        }
    )
    assert "- dense, recompute: 1e-06 / 1e-05\n- bf16: 1e-03 / 2e-02\n" in text
    assert "`recompute` has every bit of `dense` in 1 of the 2 layouts" in text
    assert "4 cells were run; 3 are within the tolerance" in text
    assert "to other experts than on one process: 2, in 1 cells." in text
    assert "- bf16 cp2: layout.context_parallel_size is 2\n" in text
    assert "| tp2 | yes | pp2 | yes | yes | 1e-09 | 0.50 | 2.0 / 1.0 | 3.0 |" in text

"""Every layout once, every kind of network on some layouts: steps as on one process; restarts and reshards.

Tolerances are those of support/parity_cases.py, which docs/parity.md states. A choice of experts is discontinuous; the
cases here have no flip. A dozen cases of two processes belong to the default tests, the others to the slow tier.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support import parity_cases as parity
from support.gloo import run_gloo

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(3000)]

BY_NAME = {parity.name_of(layout): layout for layout in parity.LAYOUTS} | {"one": {}}
DOZEN = [
    ("dense", "tp2-sp"),
    ("dense", "pp2-vpp2"),
    ("dense", "cp2"),
    ("moe", "dp2-ep2"),
    ("moe", "tp2-ep2-sp"),
    ("packed", "tp2-sp"),
    ("packed", "cp2"),
    ("moe-recompute", "tp2-ep2-sp"),
    ("overlap", "dp2"),
    ("bf16", "dp2"),
    ("block", "cp2"),
    ("autoregressive", "pp2"),
]
OF_KINDS = {
    "tied": ("tp2-sp", "pp2-vpp2", "cp2"),
    "moe": ("dp2-ep2", "tp2-ep2-sp", "cp2-ep2", "pp2-vpp2-dp2-ep2", "tp2-dp2-ep2-etp2-sp"),
    "packed": ("pp3-balanced", "tp2-sp", "cp2"),
    "recompute": ("tp2-sp", "pp2-vpp2", "pp2-cp2"),
    "moe-recompute": ("tp2-ep2-sp", "dp2-ep2", "cp2-ep2"),
    "overlap": ("dp2", "tp2-dp2-sp", "pp2-dp2"),
    "block": ("tp2-sp", "pp2", "cp2"),
    "autoregressive": ("tp2-sp", "pp2", "cp2"),
    "bf16": ("tp2-sp", "pp2", "dp2"),
}
CASES = [("dense", parity.name_of(layout)) for layout in parity.LAYOUTS if parity.refusal("dense", layout) is None]
CASES += [(kind, name) for kind, names in OF_KINDS.items() for name in names]
FEW_STEPS, SLOW_STEPS = 2, 8
# ten layouts stop and continue; the state of each goes to one process, from there to the next one, and back
RESTARTS = ("one", "dp2", "pp2", "pp2-vpp2", "cp2", "tp2-sp", "dp2-ep2", "tp2-dp2-sp", "pp2-cp2", "tp2-pp2-dp2-sp")


def processes(name: str) -> int:
    return parity.num_processes(BY_NAME[name])


def in_order(names: list[str]) -> dict[int, list[str]]:
    sizes = sorted({processes(name) for name in names})
    return {size: [name for name in names if processes(name) == size] for size in sizes}


def run_all(cases: list[tuple[str, str]], num_steps: int) -> dict:
    """The reports of every rank of the cases, those of one number of processes in the same processes."""
    found = {}
    for size in sorted({processes(name) for _, name in cases}):
        alike = [case for case in cases if processes(case[1]) == size]
        runs = [[kind, BY_NAME[name]] for kind, name in alike]
        ranks = run_gloo(size, parity.__file__, "run_cases", timeout_s=2400, runs=runs, num_steps=num_steps)
        found |= {case: [answers[number] for answers in ranks] for number, case in enumerate(alike)}
    return found


def check(case: tuple[str, str], ranks: list, of_one_process: dict) -> None:
    """All ranks report the same, and what one process does."""
    [expected] = of_one_process[parity.BASE.get(case[0], case[0]), "one"]
    assert all(reports == ranks[0] for reports in ranks)
    difference = parity.differences(ranks[0], expected)
    assert difference["flips"] == 0
    assert parity.is_within(case[0], difference), difference


def singles(cases: list[tuple[str, str]], num_steps: int) -> dict:
    kinds = dict.fromkeys(parity.BASE.get(kind, kind) for kind, _ in cases)
    return run_all([(kind, "one") for kind in kinds], num_steps)


@pytest.fixture(scope="module")
def few() -> dict:
    return run_all(DOZEN, FEW_STEPS) | singles(DOZEN, FEW_STEPS)


@pytest.fixture(scope="module")
def matrix() -> dict:
    return run_all(CASES, SLOW_STEPS) | singles(CASES, SLOW_STEPS)


@pytest.mark.promise("every kind of network takes the same first steps on a layout as on one process")
@pytest.mark.parametrize("case", DOZEN, ids="-".join)
def test_layout_takes_the_first_steps_of_one_process(case, few):
    check(case, few[case], few)


@pytest.mark.slow
@pytest.mark.promise("every layout takes the same steps as one process, for every kind of network")
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_layout_takes_the_steps_of_one_process(case, matrix):
    check(case, matrix[case], matrix)


@pytest.mark.slow
@pytest.mark.promise("recomputation changes no bit of a step, on any layout")
@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ("recompute", "moe-recompute")], ids="-".join)
def test_recomputation_changes_no_bit(case, matrix):
    kind, name = case
    assert matrix[case] == matrix[parity.BASE[kind], name]


@pytest.mark.promise("a layout that does not fit is refused before a process starts, with the nearest value that does")
def test_layouts_that_do_not_fit_are_refused():
    assert "model.num_layers is 4" in str(parity.refusal("dense", BY_NAME["pp3"]))
    assert "dense network" in str(parity.refusal("dense", BY_NAME["dp2-ep2"]))
    assert "would send the same tokens" in str(parity.refusal("moe", BY_NAME["tp2"]))


@pytest.mark.slow
@pytest.mark.promise("ten layouts stop and continue bit for bit, and their states change places without a changed bit")
def test_ten_layouts_continue_and_change_places(tmp_path):
    root = str(tmp_path)
    for size, names in in_order(list(RESTARTS)).items():
        runs = [["moe", BY_NAME[name]] for name in names]
        for answers in run_gloo(size, parity.__file__, "run_restarts", timeout_s=1200, root=root, runs=runs):
            assert answers == [{"is_equal": True}] * len(names)
    to_one = [[f"moe-{name}", f"single-{name}", {}] for name in RESTARTS]
    [ones] = run_gloo(1, parity.__file__, "run_reshards", timeout_s=1200, root=root, kind="moe", runs=to_one)
    following = dict(zip(RESTARTS, (*RESTARTS[1:], RESTARTS[0]), strict=True))
    for size, names in in_order(list(RESTARTS)).items():
        sources = [name for name in RESTARTS if following[name] in names]
        runs = [[f"single-{name}", f"far-{name}", BY_NAME[following[name]]] for name in sources]
        ranks = run_gloo(size, parity.__file__, "run_reshards", timeout_s=1200, root=root, kind="moe", runs=runs)
        for number, name in enumerate(sources):
            of_ranks = [answers[number] for answers in ranks]
            expected = ones[RESTARTS.index(name)]["report"]
            assert of_ranks[0]["report"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            total = sum(answer["stored"] for answer in of_ranks)
            # no rank has more than its share of the experts and of the rest; the rest is not cut further by experts
            assert max(answer["stored"] for answer in of_ranks) <= 0.75 * total or size == 1
    back = [[f"far-{name}", f"back-{name}", {}] for name in RESTARTS]
    run_gloo(1, parity.__file__, "run_reshards", timeout_s=1200, root=root, kind="moe", runs=back)
    for name in RESTARTS:
        assert bytes_of(tmp_path / f"single-{name}") == bytes_of(tmp_path / f"back-{name}")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}

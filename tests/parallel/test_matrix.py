"""Every layout once, every kind of network on some layouts: 20 steps as on one process; restarts and reshards.

Tolerances: float32 cells differ by the order of sums (docs/parity.md: below 1e-6 in loss and 1e-5 in gradient norm),
bf16 cells by roundings of activations. A choice of experts is discontinuous; the cases here have no flip.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support import parity_cases as parity
from support.gloo import run_gloo

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(3000)]

BY_NAME = {parity.name_of(layout): layout for layout in parity.LAYOUTS} | {"one": {}}
OF_KINDS = {
    "tied": ("tp2-sp", "pp2-vpp3", "cp2"),
    "moe": ("dp2-ep2", "tp2-ep2-sp", "cp2-ep2", "pp2-vpp3-dp2-ep2", "tp2-dp2-ep2-etp2-sp"),
    "packed": ("pp3", "tp2-sp", "cp2"),
    "block": ("tp2-sp", "pp2", "cp2"),
    "autoregressive": ("tp2-sp", "pp2", "cp2"),
    "bf16": ("tp2-sp", "pp2", "dp2"),
}
CASES = [("dense", parity.name_of(layout)) for layout in parity.LAYOUTS if parity.refusal("dense", layout) is None]
CASES += [(kind, name) for kind, names in OF_KINDS.items() for name in names]
# ten layouts stop and continue; the state of each goes to one process, from there to the next one, and back
RESTARTS = ("one", "dp2", "pp2", "pp2-vpp3", "cp2", "tp2-sp", "dp2-ep2", "tp2-dp2-sp", "pp2-cp2", "tp2-pp2-dp2-sp")


def processes(name: str) -> int:
    return parity.num_processes(BY_NAME[name])


def in_order(names: list[str]) -> dict[int, list[str]]:
    sizes = sorted({processes(name) for name in names})
    return {size: [name for name in names if processes(name) == size] for size in sizes}


@pytest.fixture(scope="module")
def single() -> dict:
    answers = run_gloo(1, parity.__file__, "run_cases", timeout_s=1200, runs=[[kind, {}] for kind in parity.KINDS])
    return dict(zip(parity.KINDS, answers[0], strict=True))


@pytest.fixture(scope="module")
def matrix() -> dict:
    found = {}
    for size in sorted({processes(name) for _, name in CASES}):
        cases = [case for case in CASES if processes(case[1]) == size]
        runs = [[kind, BY_NAME[name]] for kind, name in cases]
        ranks = run_gloo(size, parity.__file__, "run_cases", timeout_s=2400, runs=runs)
        found |= {case: [answers[number] for answers in ranks] for number, case in enumerate(cases)}
    return found


@pytest.mark.promise("every layout takes the same steps as one process, for every kind of network")
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_layout_takes_the_steps_of_one_process(case, single, matrix):
    kind, _ = case
    ranks = matrix[case]
    assert all(reports == ranks[0] for reports in ranks)
    difference = parity.differences(ranks[0], single[kind])
    assert difference["is_exact"] and difference["flips"] == 0
    assert difference["loss"] < (1e-3 if kind == "bf16" else 1e-6)
    assert difference["grad_norm"] < (2e-2 if kind == "bf16" else 1e-5)


@pytest.mark.promise("a layout that does not fit is refused before a process starts, with the nearest value that does")
def test_layouts_that_do_not_fit_are_refused():
    assert "model.num_layers is 6" in str(parity.refusal("dense", BY_NAME["pp4"]))
    assert "dense network" in str(parity.refusal("dense", BY_NAME["dp2-ep2"]))
    assert "would send the same tokens" in str(parity.refusal("moe", BY_NAME["tp2"]))


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

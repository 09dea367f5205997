"""Emulated FP8 on layouts: what the loss law becomes when magnitudes belong to a micro-batch or to a history.

Equal to rounding of float32: what leaves every quantised tensor as it is (pipeline stages, data-parallel ranks at one
micro-batch size), and for delayed scaling what leaves the passes of a step and their global magnitudes as they are.
Tensor-parallel shards have magnitudes of their own under tensorwise and blockwise scaling: near, to rounding of FP8.
"""

from __future__ import annotations

from typing import Any

import pytest

from support import fp8_worker as worker
from support.gloo import run_gloo

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

TENSOR, PIPELINE, DATA = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"data_parallel_size": 2}
SEQUENCE = TENSOR | {"sequence_parallel": True}
RECIPES = ("tensorwise", "delayed", "blockwise")

ONE = [[recipe, {}, 2] for recipe in RECIPES] + [["delayed", {}, 4], ["tensorwise", {}, 1]]
TWO = [[recipe, layout, 2] for recipe in RECIPES for layout in (SEQUENCE, PIPELINE, DATA)] + [["delayed", TENSOR, 2]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("fp8")
    found = {}
    for size, runs in ((1, ONE), (2, TWO)):
        ranks = run_gloo(size, worker.__file__, "run_layouts", root=str(root), runs=runs)
        found |= {name(run): [rank[number] for rank in ranks] for number, run in enumerate(runs)}
    return found


def name(run: list[Any]) -> str:
    recipe, layout, micro_batch_size = run
    return "-".join(
        [recipe, *(f"{key.split('_')[0]}{int(value)}" for key, value in layout.items()), f"m{micro_batch_size}"]
    )


def losses(answers: Any, recipe: str, layout: dict[str, Any], micro_batch_size: int) -> list[float]:
    return [report["loss"] for report in answers[name([recipe, layout, micro_batch_size])][0]["reports"]]


@pytest.mark.promise("FP8 training resumes bit for bit, the state of delayed scaling included")
@pytest.mark.parametrize("run", TWO, ids=name)
def test_layouts_train_alike_on_their_ranks_and_resume_bit_for_bit(run: list[Any], answers: Any) -> None:
    first, second = answers[name(run)]
    for rank in (first, second):
        assert all(report["is_finite"] for report in rank["reports"])
        assert rank["resumed"] == rank["reports"][worker.SAVED_STEP :]
        assert rank["resumed_digest"] == rank["digest"] == first["digest"]
    assert first["reports"] == second["reports"]


@pytest.mark.promise("pipeline stages and data-parallel ranks change FP8 training only by the order of sums")
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("layout", [PIPELINE, DATA], ids=["pipeline", "data"])
def test_layouts_that_cut_no_quantised_tensor_agree(recipe: str, layout: dict[str, Any], answers: Any) -> None:
    wanted, found = losses(answers, recipe, {}, 2), losses(answers, recipe, layout, 2)
    assert found[0] == pytest.approx(wanted[0], rel=1e-9)
    assert found == pytest.approx(wanted, rel=1e-4)  # a sum in another order may flip a rounding to FP8 later


@pytest.mark.promise("delayed scaling agrees where passes and their global magnitudes agree")
@pytest.mark.parametrize(
    ("layout", "micro_batch_size", "one_process"),
    [(PIPELINE, 2, 2), (TENSOR, 2, 2), (SEQUENCE, 2, 2), (DATA, 2, 4)],
    ids=["pipeline", "tensor", "sequence", "data"],
)
def test_delayed_scaling_agrees_for_equal_passes(
    layout: dict[str, Any], micro_batch_size: int, one_process: int, answers: Any
) -> None:
    """Two data-parallel ranks with 2 samples make as many passes as one with 4."""
    wanted, found = losses(answers, "delayed", {}, one_process), losses(answers, "delayed", layout, micro_batch_size)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_what_cuts_a_quantised_tensor_agrees_to_rounding_of_fp8_only(answers: Any) -> None:
    """The converse: these pairs are not equal, so nothing may promise that they are."""
    for recipe, layout, micro_batch_size in (
        ("tensorwise", SEQUENCE, 2),
        ("tensorwise", {}, 1),
        ("blockwise", SEQUENCE, 2),
    ):
        wanted, found = losses(answers, recipe, {}, 2)[0], losses(answers, recipe, layout, micro_batch_size)[0]
        assert found == pytest.approx(wanted, rel=1e-2)
        assert recipe == "blockwise" or found != pytest.approx(wanted, rel=1e-6)


@pytest.mark.promise("gradients summed during the backward pass are those summed after it, bit for bit")
@pytest.mark.promise("weights gathered during the forward pass are those gathered before it, bit for bit")
def test_overlapped_sums_of_gradients_change_no_bit_of_the_weights() -> None:
    """In bf16, where embedding and output layer add to the float32 buffers themselves; two ranks add in one order."""
    for plain, *others in run_gloo(2, worker.__file__, "overlap", layout=DATA):
        for overlapped in others:
            assert overlapped["digest"] == plain["digest"]
            assert overlapped["scores"] == plain["scores"]
            for one, other in zip(overlapped["reports"], plain["reports"], strict=True):
                assert one["loss"] == other["loss"]
                assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)

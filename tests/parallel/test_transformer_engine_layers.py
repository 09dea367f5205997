"""Transformer Engine's layers train as the local ones, on every layout; the library is a substitute in plain torch.

The two kinds add the same float32 numbers in other orders inside the norms. Adam passes such a difference on to the
weights, so later steps agree less closely than the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamask.engine.backend import select_backend
from megamask.engine.specs import families
from megamask.errors import UsageError
from support import te_worker as worker
from support.gloo import run_gloo

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

TENSOR = {"tensor_parallel_size": 2}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [TENSOR, TENSOR | {"sequence_parallel": True}, {"pipeline_parallel_size": 2}],
}
RUNS = {size: [[spec, layout] for spec in worker.SPECS for layout in layouts] for size, layouts in LAYOUTS.items()}
CASES = [(size, number) for size, runs in RUNS.items() for number in range(len(runs))]


def name(case: tuple[int, int]) -> str:
    spec, layout = RUNS[case[0]][case[1]]
    return "-".join([spec, *(f"{key.split('_')[0]}{int(value)}" for key, value in layout.items())])


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("layers")
    found = {}
    for size, runs in RUNS.items():
        ranks = run_gloo(size, worker.__file__, "run_layouts", root=str(root), runs=runs)
        found |= {(size, number): [rank[number] for rank in ranks] for number in range(len(runs))}
    return found


@pytest.mark.promise("layers of Transformer Engine train as the local ones on every layout (substitute, float32)")
@pytest.mark.parametrize("case", CASES, ids=name)
def test_steps_are_those_of_the_local_layers(case: tuple[int, int], answers: Any) -> None:
    for rank in answers[case]:
        assert rank["has_fused_norms"]
        local, fused = rank["reports"]["local"], rank["reports"]["te"]
        assert fused[0]["loss"] == pytest.approx(local[0]["loss"], rel=1e-6)
        assert fused[0]["grad_norm"] == pytest.approx(local[0]["grad_norm"], rel=1e-5)
        for one, two in zip(fused, local, strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.promise("a checkpoint of Transformer Engine's layers loads into the local ones bit for bit")
@pytest.mark.parametrize("case", CASES, ids=name)
def test_state_crosses_to_the_local_layers_bit_for_bit(case: tuple[int, int], answers: Any) -> None:
    assert all(rank["is_state_equal"] for rank in answers[case])


@pytest.mark.promise("weight gradients that the products add to the buffers are those that hooks add (substitute)")
def test_weight_gradients_added_within_the_products_are_those_of_the_hooks() -> None:
    for rank in run_gloo(2, worker.__file__, "run_weight_gradients"):
        separate = rank["separate False"]
        assert not any(separate["added"])
        for overlap in (False, True):
            fused = rank[f"fused {overlap}"]
            assert len(fused["added"]) == 8 and all(fused["added"])
            assert fused["reports"] == separate["reports"]
            assert fused["digest"] == separate["digest"]


@pytest.mark.parametrize(("is_installed", "reason"), [(False, "is not installed"), (True, "sees no GPU")])
def test_layers_that_cannot_run_here_are_refused(monkeypatch: Any, is_installed: bool, reason: str) -> None:
    monkeypatch.setattr(families.importlib.util, "find_spec", lambda name: object() if is_installed else None)
    with pytest.raises(UsageError, match=rf"device\.layers is 'te', but .*{reason}.*; allowed here: local") as error:
        families.layer_family("te", select_backend())
    assert "device.layers=local" in str(error.value.hint)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    answer: dict[str, Any] = run_gloo(1, worker.__file__, "run_recipes", root=str(tmp_path_factory.mktemp("recipes")))[
        0
    ]
    return answer


@pytest.mark.promise(
    "Transformer Engine's linear layers run in the recipe of precision.fp8, the first and last in bf16"
)
def test_each_linear_layer_runs_in_its_recipe(recipes: dict[str, Any]) -> None:
    """Four linear layers in each of three layers, one micro-batch."""
    found = {name: [recipe for _, recipe in recipes[name]] for name in worker.RECIPES}
    assert found["none"] == [None] * 12
    assert found["tensorwise"] == ["Float8CurrentScaling"] * 12
    assert found["middle"] == [None] * 4 + ["Float8CurrentScaling"] * 4 + [None] * 4
    assert found["blockwise"] == ["Float8BlockScaling"] * 12
    assert found["delayed"] == [None] * 12 + ["DelayedScaling"] * 12  # the calibrating pass comes first


def test_delayed_state_inside_the_library_is_saved_and_restored(recipes: dict[str, Any]) -> None:
    assert recipes["state"]


@pytest.mark.promise("device.attention=te computes what torch's attention does, on every objective that it takes")
@pytest.mark.promise("packed documents reach Transformer Engine by their bounds (substitute)")
@pytest.mark.promise(
    "with device.attention=te context parallelism is a ring, whose loss is that of gathering (substitute)"
)
@pytest.mark.parametrize("size", [1, 2])
def test_attention_of_the_library_is_torchs(size: int, tmp_path: Path) -> None:
    ring = " ring" if size > 1 else ""
    masks = {
        "tensor masked": "no_mask",
        "tensor autoregressive": "causal",
        "tensor packed masked": "padding",
        "tensor packed autoregressive": "padding_causal",
        "context masked": f"no_mask{ring}",
        "context autoregressive": f"causal{ring}",
    }
    for rank in run_gloo(size, worker.__file__, "run_attention", root=str(tmp_path)):
        for case, mask in masks.items():
            theirs, ours = rank[f"{case} te"], rank[f"{case} sdpa"]
            assert theirs["masks"] == [mask] and ours["masks"] == []
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-5)
        assert rank["tensor packed masked te"]["loss"] != pytest.approx(rank["tensor masked te"]["loss"], rel=1e-4)


EXPERTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [
        {"data_parallel_size": 2, "expert_parallel_size": 2},
        TENSOR | {"sequence_parallel": True, "expert_tensor_parallel_size": 2},
    ],
}


@pytest.mark.promise(
    "grouped experts of Transformer Engine train as those one after another, from the same checkpoints"
)
@pytest.mark.parametrize("size", EXPERTS)
def test_grouped_experts_are_those_one_after_another(size: int, tmp_path: Path) -> None:
    for rank in run_gloo(size, worker.__file__, "run_experts", root=str(tmp_path), layouts=EXPERTS[size]):
        for layout, answer in zip(EXPERTS[size], rank, strict=True):
            assert answer["groups"] == [4 // layout.get("expert_parallel_size", 1)]
            assert answer["is_state_equal"]
            for one, two in zip(answer["reports"]["grouped"], answer["reports"]["sequential"], strict=True):
                assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
                assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
                assert one["expert_counts"] == two["expert_counts"]


def test_grouped_experts_that_cannot_run_here_are_refused() -> None:
    with pytest.raises(UsageError, match=r"device\.experts is 'grouped', but .*; allowed here: auto, sequential"):
        families.groups_experts("grouped", select_backend())
    assert not families.groups_experts("auto", select_backend())

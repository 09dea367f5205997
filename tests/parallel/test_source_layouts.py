"""A published model's weights in the engine, on every layout, against transformers' network or a plain reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megamask.models.families.registry import FAMILIES as REGISTRY
from support import source_worker as worker
from support.gloo import run_gloo
from support.hub_models import VOCABULARY, causal_logits, full_logits, save_hub_folder

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

DENSE = ("llama", "qwen2", "qwen3", "dream", "sdar", "fast_dllm_v2", "illada", "llada")
FAMILIES = (*DENSE, "qwen3_moe", "rnd1", "llada_moe", "llada2_moe")
LAYOUTS = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "expert": {"expert_parallel_size": 2, "data_parallel_size": 2},
}
RUNS = [
    (family, layout)
    for family in FAMILIES
    for layout in LAYOUTS
    if layout != "expert" or REGISTRY[family].experts is not None
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Folder of each family, and transformers' cross entropy of the same positions."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = save_hub_folder(folder, family, num_hidden_layers=4)
        tokens = worker.tokens_of(VOCABULARY)
        with torch.no_grad():
            logits = {"bidirectional": full_logits(model, tokens), "causal": causal_logits(model, tokens)}
        found[family] = (folder, {name: _cross_entropy(value, tokens) for name, value in logits.items()})
    return found


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    values = F.cross_entropy(logits.flatten(0, 1).double(), tokens.flatten(), reduction="none")
    return values.view_as(tokens)[:, ::5].T


def _layout(family: str, layout: str) -> dict:
    """Experts with tensor parallelism need sequence parallelism."""
    is_divided = layout == "tensor" and REGISTRY[family].experts is not None
    return LAYOUTS[layout] | ({"sequence_parallel": True} if is_divided else {})


@pytest.fixture(scope="module")
def found(expected: dict) -> dict:
    runs = [[str(expected[family][0]), _layout(family, layout)] for family, layout in RUNS]
    ranks = run_gloo(2, worker.__file__, "scores", runs=runs)
    return {run: [answers[number] for answers in ranks] for number, run in enumerate(RUNS)}


@pytest.mark.promise("A published model's weights give transformers' scores at tensor, pipeline and expert size 2")
@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_scores_on_a_layout_are_those_of_transformers(run: tuple[str, str], expected: dict, found: dict) -> None:
    for answer in found[run]:
        for name, values in answer.items():
            assert torch.allclose(
                torch.tensor(values, dtype=torch.float64), expected[run[0]][1][name], rtol=1e-5, atol=1e-5
            ), name


def test_one_process_gives_the_same_scores(expected: dict, tmp_path: Path) -> None:
    runs = [[str(expected[family][0]), {}] for family in FAMILIES]
    [answers] = run_gloo(1, worker.__file__, "scores", runs=runs)
    for family, answer in zip(FAMILIES, answers, strict=True):
        for name, values in answer.items():
            assert torch.allclose(
                torch.tensor(values, dtype=torch.float64), expected[family][1][name], rtol=1e-5, atol=1e-5
            ), name

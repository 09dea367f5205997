"""One network, one batch, one noise: every layout takes the same steps.

Losses agree to 1e-6 relative. A layout changes only the order of float32 sums (unit roundoff 6e-8): partial products
over the tensor-parallel ranks, gradients over micro-batches and data-parallel ranks. After twenty steps that is
some roundings of each weight; a wrong shard, weight or mask shows in the first digits. Integers agree exactly.

In bf16 (unit roundoff 2e-3) tensor-parallel ranks round partial sums of activations where one process rounds their
total, and a master weight near the middle of two bf16 numbers then falls to the other side. The loss is a mean over 250
tokens: the first step differs by 2e-5, later ones by up to 1e-4 (measured). float32 runs of these networks differ from
bf16 ones by as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support import engine_cases as cases
from support import layout_worker as worker
from support.gloo import run_gloo

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

TENSOR = {"tensor_parallel_size": 2}
SEQUENCE = TENSOR | {"sequence_parallel": True}
PIPELINE = {"pipeline_parallel_size": 2}
DATA = {"data_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
VIRTUAL = PIPELINE | {"virtual_pipeline_parallel_size": 2}
EXPERTS = {"expert_parallel_size": 2}
BALANCED = PIPELINE | {"pipeline_split": "balanced"}  # of four layers and the head: stages of two and of one
TWO = [(spec, layout) for spec in ("plain", "options") for layout in (TENSOR, SEQUENCE, PIPELINE, DATA)]
TWO += [("bf16", layout) for layout in (SEQUENCE, PIPELINE, DATA)]
TWO += [("options", CONTEXT), ("deep", VIRTUAL), ("odd", BALANCED)]
TWO += [("experts", EXPERTS | DATA), ("experts", EXPERTS | SEQUENCE), ("experts", CONTEXT)]
FOUR = [
    ("plain", TENSOR | DATA),
    ("options", SEQUENCE | PIPELINE),
    ("deep", {"pipeline_parallel_size": 4}),
    ("deep", VIRTUAL | CONTEXT),
]


def name(run) -> str:
    spec, layout = run
    return f"{spec}-" + "-".join(f"{key.removesuffix('_size')}{value}" for key, value in layout.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def single(root) -> dict:
    """One process, the same network: what every layout is compared with; its state lies in `root`."""
    answers = run_gloo(1, worker.__file__, "run_layouts", root=str(root), runs=[[spec, {}] for spec in worker.SPECS])
    return dict(zip(worker.SPECS, answers[0], strict=True))


@pytest.fixture(scope="module")
def layouts(root, single) -> dict:
    """All ranks' answers for each run."""
    found = {}
    for num_processes, runs in ((2, TWO), (4, FOUR)):
        answers = run_gloo(
            num_processes, worker.__file__, "run_layouts", root=str(root), runs=[list(run) for run in runs]
        )
        found |= {name(run): [answer[number] for answer in answers] for number, run in enumerate(runs)}
    return found


every_layout = pytest.mark.parametrize("run", TWO + FOUR, ids=name)


@dataclass(frozen=True)
class Tolerance:
    """Relative; of one noise level, which few tokens of the batch share."""

    loss: float = 1e-6
    grad_norm: float = 1e-5
    noise_level: float = 1e-5
    score: float = 1e-5


FLOAT32 = Tolerance()
BFLOAT16 = Tolerance(loss=5e-4, grad_norm=1e-2, noise_level=5e-3, score=5e-3)


def tolerance_of(run) -> Tolerance:
    return BFLOAT16 if run[0] == "bf16" else FLOAT32


def close(reports: list[dict], expected: list[dict], tolerance: Tolerance) -> None:
    for one, two in zip(reports, expected, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=tolerance.loss)
        assert one["loss_terms"] == pytest.approx(two["loss_terms"], rel=tolerance.loss)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=tolerance.grad_norm)
        for field in ("num_eligible", "masked_tokens", "masked_tokens_by_noise_level", "content_sum", "is_finite"):
            assert one[field] == two[field], field
        for mean, other in zip(one["loss_by_noise_level"], two["loss_by_noise_level"], strict=True):
            assert mean == (None if other is None else pytest.approx(other, rel=tolerance.noise_level))


@pytest.mark.promise("the losses and counts by noise level are equal on every layout")
@pytest.mark.promise("the z-loss is equal on every layout, including tensor parallelism")
@pytest.mark.promise("bf16 layouts agree to a stated tolerance and resume bit for bit")
@pytest.mark.promise("a checkpoint written during training holds, bit for bit, the state of the step it names")
@every_layout
def test_steps_are_those_of_one_process(run, single, layouts):
    ranks = layouts[name(run)]
    close(ranks[0]["reports"], single[run[0]]["reports"], tolerance_of(run))
    if run[0] == "bf16":
        assert ranks[0]["reports"][0]["loss"] == pytest.approx(single["bf16"]["reports"][0]["loss"], rel=4e-5)
    assert all(rank["reports"] == ranks[0]["reports"] for rank in ranks), "ranks disagree about their step"


@pytest.mark.promise("a run resumed on its layout is bit-identical")
@pytest.mark.promise("bf16 layouts agree to a stated tolerance and resume bit for bit")
@every_layout
def test_resumed_run_is_bit_identical_on_the_same_layout(run, layouts):
    for rank in layouts[name(run)]:
        assert rank["resumed"] == [rank["reports"][step - 1] for step in worker.RESUMED_STEPS]
        assert rank["resumed_digest"] == rank["digest"]


@pytest.mark.promise("the state of any layout continues on any other")
@every_layout
def test_state_of_one_process_goes_on_under_any_layout(run, single, layouts):
    for rank in layouts[name(run)]:
        close([rank["resharded"]], [single[run[0]]["reports"][worker.SAVED_STEP]], tolerance_of(run))


@every_layout
def test_every_rank_names_its_own_files_and_together_all(run, root, layouts):
    names = [file for rank in layouts[name(run)] for file in rank["files"]]
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(path.name for path in worker.folder_of(str(root), *run).iterdir())


@pytest.mark.promise("every layout scores as the reference network does")
@every_layout
def test_scores_are_the_reference_networks_on_every_rank(run, root, layouts):
    """Of the weights that were saved at that step, read without any engine."""
    from megamask.engine.state.restore import read_canonical_weights

    spec, goal = worker.SPECS[run[0]], cases.objective()
    model = cases.reference(spec)
    model.load_state_dict(read_canonical_weights(worker.folder_of(str(root), *run), spec))
    with torch.no_grad():
        expected = cases.reference_cross_entropy(model, *cases.probe_rows(worker.NUM_PROBE_ROWS, spec), goal)
    for rank in layouts[name(run)]:
        assert rank["scores"] == pytest.approx(expected.tolist(), rel=tolerance_of(run).score, abs=1e-6)
        assert rank["scores"] == layouts[name(run)][0]["scores"]


@pytest.mark.promise("no rank updates when one weight of one rank is NaN")
@every_layout
def test_no_rank_updates_when_one_weight_of_one_rank_is_nan(run, layouts):
    assert [rank["poisoned"] for rank in layouts[name(run)]] == [
        {"is_finite": False, "is_unchanged": True} for _ in layouts[name(run)]
    ]


@pytest.mark.promise("the state of any layout continues on any other")
def test_every_layouts_state_goes_on_in_one_process(root, single, layouts):
    answers = run_gloo(1, worker.__file__, "resume_all", root=str(root), runs=[list(run) for run in TWO + FOUR])
    for run, report in zip(TWO + FOUR, answers[0], strict=True):
        close([report], [single[run[0]]["reports"][worker.SAVED_STEP]], tolerance_of(run))


def test_every_rank_raises_when_one_cannot_go_on(root, single):
    answers = run_gloo(2, worker.__file__, "fail_alike", root=str(root), layout=PIPELINE)
    assert all(answer["load"].startswith("CheckpointIntegrityError") for answer in answers)
    assert "nowhere" in answers[0]["load"] and answers[0]["load"].startswith("CheckpointIntegrityError: rank 1: ")

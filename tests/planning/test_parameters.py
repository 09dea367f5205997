"""A rank's parameters, gradients and optimizer state: the arithmetic against the modules themselves."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from megamask.config.rules.layout import AxisSizes
from megamask.models.counts import parameter_count
from megamask.models.experts import ExpertSpec
from megamask.models.spec import ModelSpec
from megamask.planning.parameters import fullest_within, parameter_bytes
from support.command import ROOT
from support.engine_cases import OPTIONS, PLAIN
from support.planned import dense, subject_of

DENSE_8B = dense(layers=32, hidden=4096, forward=12288, heads=32, groups=32, vocabulary=126_464)
DENSE_70B = dense(layers=80, hidden=8192, forward=28672, heads=64, groups=8, vocabulary=128_256)
DENSE_405B = dense(layers=126, hidden=16384, forward=53248, heads=128, groups=8, vocabulary=128_256)
MOE = dataclasses.replace(
    dense(layers=16, hidden=4096, forward=8192, heads=32, groups=8, vocabulary=126_464),
    qk_norm=True,
    experts=ExpertSpec(num_experts=64, topk=6, ffn_hidden_size=1024, num_shared=1, num_dense_layers=1),
)
SEQUENCE_8 = {"tensor_parallel_size": 8, "sequence_parallel": True}
CASES = [
    pytest.param(DENSE_8B, SEQUENCE_8 | {"pipeline_parallel_size": 2, "data_parallel_size": 64}, 0, "bf16", id="8b"),
    pytest.param(
        DENSE_8B, SEQUENCE_8 | {"pipeline_parallel_size": 2, "data_parallel_size": 64}, 777, "fp32", id="8b-777"
    ),
    pytest.param(
        DENSE_70B, SEQUENCE_8 | {"pipeline_parallel_size": 8, "data_parallel_size": 64}, 4095, "bf16", id="70b"
    ),
    pytest.param(
        DENSE_405B,
        SEQUENCE_8 | {"pipeline_parallel_size": 16, "data_parallel_size": 128, "pipeline_split": "balanced"},
        16383,
        "bf16",
        id="405b-16384-ranks",
    ),
    pytest.param(
        DENSE_70B,
        SEQUENCE_8 | {"pipeline_parallel_size": 4, "virtual_pipeline_parallel_size": 5, "data_parallel_size": 32},
        300,
        "bf16",
        id="70b-interleaved",
    ),
    pytest.param(
        DENSE_70B,
        SEQUENCE_8 | {"pipeline_parallel_size": 4, "context_parallel_size": 4, "data_parallel_size": 8},
        5,
        "bf16",
        id="70b-context",
    ),
    pytest.param(
        OPTIONS,
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 3},
        7,
        "bf16",
        id="tied-on-two-stages",
    ),
    pytest.param(OPTIONS, {"tensor_parallel_size": 2, "data_parallel_size": 3}, 5, "fp32", id="tied-on-one-stage"),
    pytest.param(MOE, SEQUENCE_8 | {"data_parallel_size": 16, "expert_parallel_size": 32}, 77, "bf16", id="moe-ep32"),
    pytest.param(
        MOE,
        SEQUENCE_8
        | {
            "pipeline_parallel_size": 4,
            "data_parallel_size": 8,
            "expert_parallel_size": 16,
            "expert_tensor_parallel_size": 2,
        },
        201,
        "bf16",
        id="moe-ep16-etp2",
    ),
    pytest.param(PLAIN, {"data_parallel_size": 5}, 3, "bf16", id="shares-that-do-not-divide"),
]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, int]]:
    """Allocations of megatron-core on each case's rank."""
    cases = [
        {
            "spec": spec.to_json(),
            "layout": layout,
            "world_size": _subject(spec, layout, compute).world_size,
            "rank": rank,
            "compute": compute,
        }
        for spec, layout, rank, compute in (case.values for case in CASES)
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "meta_rank.py"],
        input=json.dumps({"cases": cases}),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _subject(spec: ModelSpec, layout: dict, compute: str):
    return subject_of(spec, AxisSizes(**layout), compute=compute)


@pytest.mark.multiprocess
@pytest.mark.promise("Parameter, gradient and optimizer bytes of a plan are exact for any rank of any layout.")
@pytest.mark.parametrize(("spec", "layout", "rank", "compute"), CASES)
def test_a_planned_rank_holds_what_megatron_core_allocates(measured, request, spec, layout, rank, compute) -> None:
    found = measured[[case.id for case in CASES].index(request.node.callspec.id)]
    subject = _subject(spec, layout, compute)
    stage, within = divmod(rank, subject.ranks_of_stage)
    planned = parameter_bytes(subject, pipeline_rank=stage, within=within)
    assert (planned.count, planned.parameters, planned.gradients, planned.updated) == (
        found["count"],
        found["parameters"],
        found["gradients"],
        found["updated"],
    )
    assert planned.optimizer == planned.updated * (12 if compute == "bf16" else 8)


@pytest.mark.parametrize("virtual", [1, 2])
def test_the_shares_of_all_ranks_are_the_whole_network(virtual: int) -> None:
    spec = dataclasses.replace(PLAIN, num_layers=8, padded_vocab_size=PLAIN.vocab_size + 3)
    axes = AxisSizes(data_parallel_size=5, pipeline_parallel_size=2, virtual_pipeline_parallel_size=virtual)
    subject = subject_of(spec, axes)
    updated = sum(
        parameter_bytes(subject, pipeline_rank=stage, within=share).updated for stage in range(2) for share in range(5)
    )
    padding = 2 * (spec.padded_vocab_size - spec.vocab_size) * spec.hidden_size
    assert updated == parameter_count(spec) + padding


def test_the_fullest_rank_holds_no_less_than_any_other() -> None:
    subject = subject_of(OPTIONS, AxisSizes(data_parallel_size=7))
    fullest = parameter_bytes(subject, pipeline_rank=0, within=fullest_within(subject, 0)).updated
    assert fullest == max(parameter_bytes(subject, pipeline_rank=0, within=share).updated for share in range(7))

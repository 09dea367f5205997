"""Layouts that do not fit: `plan` and `train` refuse them alike, before a process starts or a file is written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megamask_pipelines.cli.main import main
from support.command import TINY

MOE = str(TINY.with_name("tiny_moe.yaml"))
BLOCK = str(TINY.with_name("tiny_block.yaml"))
DENSE = str(TINY)

# config, overrides, the key that is named with its value, and the nearest values that work
BAD = {
    "heads": (DENSE, ["layout.tensor_parallel_size=3"], "layout.tensor_parallel_size is 3", "1, 2 (nearest: 2)"),
    "query groups": (DENSE, ["layout.tensor_parallel_size=4"], "layout.tensor_parallel_size is 4", "1, 2 (nearest: 2)"),
    "layers": (DENSE, ["layout.pipeline_parallel_size=3"], "layout.pipeline_parallel_size is 3", "1, 2 (nearest: 2)"),
    "layers, balanced": (
        DENSE,
        ["layout.pipeline_parallel_size=4", "layout.pipeline_split=balanced"],
        "layout.pipeline_parallel_size is 4",
        "allowed: 1, 2",
    ),
    "shape law, length": (
        DENSE,
        ["training.sequence_length=120"],
        "training.sequence_length is 120",
        "the nearest are 112 or 128",
    ),
    "shape law, context": (
        DENSE,
        ["layout.context_parallel_size=3"],
        "layout.context_parallel_size is 3",
        "(nearest: 2)",
    ),
    "shape law, context and tensor": (
        DENSE,
        ["training.sequence_length=48", "layout.context_parallel_size=8", "layout.tensor_parallel_size=2"],
        "layout.context_parallel_size is 8",
        "(nearest: 6)",
    ),
    "virtual stages without a pipeline": (
        DENSE,
        ["layout.virtual_pipeline_parallel_size=2"],
        "layout.virtual_pipeline_parallel_size is 2",
        "allowed: 1, or a layout.pipeline_parallel_size above 1",
    ),
    "virtual stages and layers": (
        MOE,
        ["layout.pipeline_parallel_size=2", "layout.virtual_pipeline_parallel_size=3"],
        "layout.virtual_pipeline_parallel_size is 3",
        "1, 2 (nearest: 2)",
    ),
    "virtual stages and micro-batches": (
        MOE,
        ["layout.pipeline_parallel_size=2", "layout.virtual_pipeline_parallel_size=2", "layout.data_parallel_size=4"],
        "layout.virtual_pipeline_parallel_size is 2",
        "allowed: 1; more with another layout.data_parallel_size",
    ),
    "batch": (DENSE, ["layout.data_parallel_size=3"], "layout.data_parallel_size is 3", "1, 2, 4, 8 (nearest: 2)"),
    "micro-batch": (DENSE, ["training.micro_batch_size=3"], "training.micro_batch_size is 3", "(nearest: 2)"),
    "sequence parallelism alone": (
        DENSE,
        ["layout.sequence_parallel=true"],
        "layout.sequence_parallel is true",
        "allowed: false, or a layout.tensor_parallel_size above 1",
    ),
    "experts of a dense network": (
        DENSE,
        ["layout.data_parallel_size=2", "layout.expert_parallel_size=2"],
        "layout.expert_parallel_size is 2",
        "allowed: 1",
    ),
    "expert count": (
        MOE,
        ["model.num_experts=12", "layout.data_parallel_size=8", "layout.expert_parallel_size=8"],
        "layout.expert_parallel_size is 8",
        "1, 2, 4 (nearest: 4)",
    ),
    "ranks of the experts": (
        MOE,
        ["layout.data_parallel_size=2", "layout.expert_parallel_size=4"],
        "layout.expert_parallel_size is 4",
        "1, 2 (nearest: 2)",
    ),
    "width of an expert": (
        MOE,
        ["model.expert_ffn_hidden_size=50", "layout.data_parallel_size=4", "layout.expert_tensor_parallel_size=4"],
        "layout.expert_tensor_parallel_size is 4",
        "1, 2 (nearest: 2)",
    ),
    "experts under tensor parallelism without sequence parallelism": (
        MOE,
        ["layout.tensor_parallel_size=2"],
        "layout.sequence_parallel is false",
        "allowed: true, or layout.tensor_parallel_size=1",
    ),
    "an objective whose mask the kernel cannot split": (
        BLOCK,
        ["device.layers=te", "device.attention=te"],
        "device.attention is 'te'",
        "allowed: auto, sdpa",
    ),
    "documents that the kernel's ring cannot split": (
        DENSE,
        ["device.layers=te", "device.attention=te", "layout.context_parallel_size=2", "data.isolate_documents=true"],
        "device.attention is 'te'",
        "allowed: auto, sdpa; or data.isolate_documents=false",
    ),
    "balance of micro-batches": (
        MOE,
        ["training.router_balance_over=micro_batch"],
        "training.router_balance_over is 'micro_batch'",
        "allowed: row; or training.allow_layout_dependent=true",
    ),
    "overlap without replicas": (
        DENSE,
        ["device.overlap_gradient_reduce=true"],
        "device.overlap_gradient_reduce is true",
        "allowed: false, or one of them above 1",
    ),
}


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", refused)
    monkeypatch.setattr("os.fork", refused)


@pytest.mark.promise(
    "a layout that does not fit is refused by `plan` and `train` alike, with the nearest value that does"
)
@pytest.mark.parametrize("case", BAD)
def test_bad_layout_is_refused_alike_before_anything_starts(case: str, capsys, tmp_path: Path) -> None:
    config, overrides, given, allowed = BAD[case]
    assert main(["plan", config, *overrides, "--json"]) == 2
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    reason = answer["reasons"][0]
    assert not answer["feasible"]
    assert reason.startswith(given) and allowed in reason
    assert main(["train", config, *overrides, "--json"]) == 2
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert trained["error"] == f"{reason}. Nothing was started."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise(
    "a layout that does not fit is refused by `plan` and `train` alike, with the nearest value that does"
)
def test_product_of_the_axes_is_compared_with_the_processes(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["layout.tensor_parallel_size=2", "layout.data_parallel_size=4"]
    assert main(["plan", DENSE, *overrides, "--gpus", "6", "--json"]) == 2
    reason = json.loads(capsys.readouterr().out.splitlines()[-1])["reasons"][-1]
    assert "needs 8 processes, but --gpus is 6; layout.data_parallel_size=2 uses 4" in reason
    for name, value in {"RANK": "0", "WORLD_SIZE": "6", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", DENSE, *overrides, "--json"]) == 2
    error = capsys.readouterr().err
    assert "the launcher started 6 processes" in error
    assert "is 8; nearest: layout.data_parallel_size=2 uses 4. Nothing was started." in error


def test_permission_lets_a_setting_depend_on_the_layout(capsys) -> None:
    overrides = ["training.router_balance_over=micro_batch", "training.allow_layout_dependent=true"]
    assert main(["plan", MOE, *overrides, "--gpu", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["feasible"]

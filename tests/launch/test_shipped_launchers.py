"""The examples for other launchers place each node as it is, and give one token to one start of a job."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamask.launch.placement import NodePlace, node_place

EXAMPLES = Path(__file__).parents[2] / "docs" / "guides" / "launchers"
_RECORDS = (
    "#!{python}\nimport json, os, sys\njson.dump([sys.argv[1:], dict(os.environ)], open('{file}', 'w'))\nsys.exit(75)\n"
)


@pytest.fixture
def megamask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for the program, first on the PATH; returns what it was started with."""
    path = tmp_path / "megamask"
    path.write_text(_RECORDS.format(python=sys.executable, file=tmp_path / "started.json"))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return lambda: json.loads((tmp_path / "started.json").read_text())


def _slurm_task(node: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": str(node),
        "SLURM_PROCID": str(node),
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "gpu-[003-004]",
    }


def _assert_place(started: tuple[list[str], dict[str, str]], node: int) -> None:
    words, environment = started
    assert words == ["launch", "node", "slurm/train.yaml"]
    place = node_place(environment)
    assert place == NodePlace(node=node, num_nodes=2, address="gpu-003", token="slurm-7.0.s0")


@pytest.mark.parametrize("node", [0, 1])
def test_submitit_example_places_a_node_and_keeps_its_code(
    megamask, monkeypatch: pytest.MonkeyPatch, node: int
) -> None:
    submitted: dict[str, Any] = {}

    class AutoExecutor:
        def __init__(self, folder: str) -> None: ...

        def update_parameters(self, **parameters: object) -> None:
            submitted.update(parameters)

        def submit(self, function: object) -> None:
            submitted["function"] = function

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor))
    runpy.run_path(str(EXAMPLES / "submitit_job.py"))
    assert (submitted["nodes"], submitted["tasks_per_node"]) == (2, 1)
    for name, value in _slurm_task(node).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        submitted["function"]()
    assert end.value.code == 75
    _assert_place(megamask(), node)


@pytest.mark.parametrize("node", [0, 1])
def test_nemo_run_example_places_a_node_and_keeps_its_code(
    megamask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, node: int
) -> None:
    given: dict[str, Any] = {}
    module = types.SimpleNamespace(
        SlurmExecutor=lambda **parameters: parameters,
        LocalTunnel=lambda job_dir: job_dir,
        Script=lambda inline: inline,
        run=lambda script, **parameters: given.update(script=script, **parameters),
    )
    monkeypatch.setitem(sys.modules, "nemo_run", module)
    runpy.run_path(str(EXAMPLES / "nemo_run.py"))
    assert (given["executor"]["nodes"], given["executor"]["ntasks_per_node"]) == (2, 1)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **_slurm_task(node)}
    assert subprocess.run(["bash", "-c", given["script"]], env=environment).returncode == 75
    _assert_place(megamask(), node)


def test_skypilot_example_places_each_node_under_one_token(megamask, tmp_path: Path) -> None:
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2
    places = []
    for start, node in ((1, 0), (1, 1), (2, 0)):
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SKYPILOT_TASK_ID": "sky-managed-2026_dense-8b_1-0",
            "SKYPILOT_NODE_IPS": f"10.0.{start}.1\n10.0.{start}.2",
            "SKYPILOT_NODE_RANK": str(node),
            "SKYPILOT_NUM_NODES": "2",
            **task["envs"],
        }
        assert subprocess.run(["bash", "-c", task["run"]], env=environment).returncode == 75
        words, started = megamask()
        assert words == ["launch", "node", "slurm/train.yaml"]
        places.append(node_place(started))
    assert [(place.node, place.num_nodes, place.address) for place in places] == [
        (0, 2, "10.0.1.1"),
        (1, 2, "10.0.1.1"),
        (0, 2, "10.0.2.1"),
    ]
    assert places[0].token == places[1].token != places[2].token


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len([line for line in path.read_text().splitlines() if line.strip() and line.strip()[0] != "#"]) <= 17

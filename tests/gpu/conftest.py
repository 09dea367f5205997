"""Tests of a CUDA device: skipped without one, unless --rehearse runs them on the CPU.

pytest tests/gpu              on a machine with a GPU
pytest tests/gpu --rehearse   on any machine: the same code on CPU tensors; where Transformer Engine is installed, its
                              own Python on the kernels of tools/te_on_cpu. What only a device shows is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.gpu_worker import HAS_TE

ROOT = Path(__file__).parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="run the tests of a GPU on the CPU where they can")


def is_rehearsal(config: pytest.Config) -> bool:
    return bool(config.getoption("--rehearse", default=False))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or is_rehearsal(config):
        return
    skip = pytest.mark.skip(reason="no CUDA device here; the engine's GPU path was not run")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """The device; in a rehearsal the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cuda() -> torch.device:
    """The device, for what no CPU can rehearse."""
    if not torch.cuda.is_available():
        pytest.skip("only a CUDA device shows this")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs jobs of support/gpu_worker.py in a process of its own, once a session: (name) -> its answer, and its log."""
    answers: dict[str, Any] = {}

    def of(job: str) -> Any:
        if job not in answers:
            answers[job] = _run(job, tmp_path_factory.mktemp(job))
        return answers[job]

    return of


def _run(job: str, folder: Path) -> dict[str, Any]:
    paths = [ROOT / "tests", ROOT / "platform", ROOT / "pipelines", ROOT / "tools" / "te_on_cpu"]
    variables = {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        **{"NVTE_FRAMEWORK": "pytorch", "NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "1"},
    }
    kernels = "emulated" if HAS_TE and not torch.cuda.is_available() else "own"
    done = subprocess.run(
        [sys.executable, "-m", "support.gpu_worker", job, str(folder), kernels],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=None if kernels == "emulated" else 280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stdout + done.stderr}

"""Rendered objects on a real API server: every check that schemas leave out. Opt-in, because it needs a server.

MEGAMASK_TEST_KUBECONFIG names a kubeconfig whose server knows JobSet; nothing is created there, all is a dry run. For
TrainJobs the server must know Kubeflow Trainer as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import pytest

from megamask.config.dump import documents_to_yaml
from megamask.launch import jobset, trainjob
from support.launch_jobs import SMALL

KUBECONFIG = os.environ.get("MEGAMASK_TEST_KUBECONFIG")
IS_MISSING = KUBECONFIG is None or shutil.which("kubectl") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        IS_MISSING,
        reason="no promise about a real API server is tested: kubectl and MEGAMASK_TEST_KUBECONFIG are needed",
    ),
]


def _dry_run(document: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["kubectl", "--kubeconfig", str(KUBECONFIG), "create", "--dry-run=server", "--validate=strict", "--filename=-"],
        input=documents_to_yaml([document]),
        capture_output=True,
        text=True,
        timeout=60,
    )


def _knows(kind: str) -> bool:
    done = subprocess.run(
        ["kubectl", "--kubeconfig", str(KUBECONFIG), "api-resources", "--output=name"], capture_output=True, text=True
    )
    return kind in done.stdout


@pytest.mark.promise("A real API server accepts the rendered objects")
def test_server_accepts_a_jobset_and_refuses_a_wrong_field() -> None:
    _, document = jobset.render(SMALL)
    accepted = _dry_run(document)
    assert accepted.returncode == 0, accepted.stderr
    document["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 2
    assert _dry_run(document).returncode != 0


@pytest.mark.promise("A real API server accepts the rendered objects")
def test_server_accepts_a_trainjob_and_its_runtime() -> None:
    if not _knows("trainjobs.trainer.kubeflow.org"):
        pytest.skip("the server does not know Kubeflow Trainer")
    for document in (trainjob.runtime("megamask"), trainjob.render(SMALL)[1]):
        accepted = _dry_run(document)
        assert accepted.returncode == 0, accepted.stderr

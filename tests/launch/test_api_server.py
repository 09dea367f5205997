"""Rendered objects on a real API server: decoded and validated as on a cluster. Nothing is created: all is a dry run.

MEGAMASK_TEST_KUBECONFIG names a kubeconfig whose server knows JobSet and Kubeflow Trainer; without one a server is
started where its program is (tests/support/api_server.py says which).
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megamask.launch import jobset, trainjob
from support.api_server import api_server, kubectl, path_of, why_not
from support.launch_jobs import FULL, SMALL

GIVEN = os.environ.get("MEGAMASK_TEST_KUBECONFIG")
REASON = None if GIVEN is not None and shutil.which("kubectl") is not None else why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        REASON is not None,
        reason=f"no promise about a real API server is tested: no MEGAMASK_TEST_KUBECONFIG, and {REASON}",
    ),
]
DOCUMENTS = {
    "jobset": lambda job: jobset.render(job)[1],
    "trainjob": lambda job: trainjob.render(job)[1],
    "runtime": lambda job: trainjob.runtime("megamask"),
}


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server of the environment, or one that lives as long as these tests."""
    if GIVEN is not None:
        yield GIVEN
        return
    with api_server(tmp_path_factory.mktemp("api")) as started:
        yield started


def _refusal(kubeconfig: str, document: dict[str, Any]) -> str | None:
    """Return the server's objection to a document; None where it accepts it."""
    namespace = document["metadata"].get("namespace", "default")
    path = f"{path_of(document['kind'], namespace)}?dryRun=All&fieldValidation=Strict"
    done = kubectl(kubeconfig, "create", "--raw", path, "-f", "-", document=document)
    return None if done.returncode == 0 else done.stderr or "refused"


@pytest.mark.promise("A real API server accepts the rendered objects")
@pytest.mark.parametrize("job", [SMALL, FULL], ids=["small", "full"])
@pytest.mark.parametrize("name", list(DOCUMENTS))
def test_server_accepts_what_is_rendered(kubeconfig: str, name: str, job: Any) -> None:
    assert _refusal(kubeconfig, DOCUMENTS[name](job)) is None


def _rename(document: dict[str, Any]) -> None:
    inner = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    inner["paralelism"] = inner.pop("parallelism")


def _wrong_type(document: dict[str, Any]) -> None:
    document["spec"]["failurePolicy"]["maxRestarts"] = "many"


@pytest.mark.promise("A real API server accepts the rendered objects")
@pytest.mark.parametrize(("spoil", "named"), [(_rename, "paralelism"), (_wrong_type, "maxRestarts")])
def test_server_refuses_a_spoilt_jobset(kubeconfig: str, spoil: Callable[[dict[str, Any]], None], named: str) -> None:
    """The tests above can fail: this server does look."""
    document = copy.deepcopy(DOCUMENTS["jobset"](SMALL))
    spoil(document)
    assert named in str(_refusal(kubeconfig, document))

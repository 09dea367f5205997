"""verify run: a run.json without what a run needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamask.storage.hashing import sha256_bytes
from megamask_pipelines.cli.main import main
from support.journal_edits import Verify, found


def rewrite_record(run_dir: Path, section: str, **values: Any) -> None:
    """A run.json that is true of itself; "gone" takes a key away."""
    path = run_dir / "run.json"
    content = json.loads(path.read_bytes())
    del content["self_sha256"]
    content[section].update(values)
    content[section] = {name: value for name, value in content[section].items() if value != "gone"}

    def to_bytes(document: dict[str, Any]) -> bytes:
        return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"

    path.write_bytes(to_bytes({**content, "self_sha256": sha256_bytes(to_bytes(content))}))


@pytest.mark.promise("an unknown training key in run.json is a finding; a missing one has its default")
def test_key_of_run_json_that_this_version_lacks_is_a_finding(run_dir: Path, verify: Verify) -> None:
    rewrite_record(run_dir, "identity", **{"training.of_tomorrow": 3})
    found(verify(65), "training.of_tomorrow is recorded as 3, but this version has no such key")


@pytest.mark.promise("an unknown training key in run.json is a finding; a missing one has its default")
def test_key_that_run_json_does_not_have_yet_stands_at_its_default(run_dir: Path, verify: Verify) -> None:
    rewrite_record(run_dir, "identity", **{"objective.z_loss_weight": "gone"})
    assert all("sha256" in entry["problem"] for entry in verify(65)["findings"])  # of the bytes, and nothing else


@pytest.mark.promise("a run.json without an identity key ends with 2 and names the key")
@pytest.mark.parametrize(
    ("section", "key", "value", "problem"),
    [
        ("identity", "training.sequence_length", "gone", "does not state training.sequence_length"),
        ("identity", "training.global_batch_size", "x", "has training.global_batch_size = 'x'"),
        ("identity", "training.batch_size_ramp_start", 0, "has training.batch_size_ramp_start = 0"),
        ("identity", "objective.complementary", 1, "has objective.complementary = 1"),
        ("extendable", "training.steps", "gone", "does not state training.steps"),
    ],
)
def test_run_json_without_what_a_run_is_ends_as_a_usage_error_that_names_the_key(
    run_dir: Path, capsys: pytest.CaptureFixture[str], section: str, key: str, value: Any, problem: str
) -> None:
    rewrite_record(run_dir, section, **{key: value})
    assert main(["verify", "run", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "Nothing was checked." in error

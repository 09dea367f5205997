"""`megamask doctor` as a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command import megamask


@pytest.mark.promise("`megamask doctor` names what a machine lacks before a run is started on it.")
def test_a_fit_machine_ends_with_0_and_lists_versions_features_and_checks(tmp_path: Path) -> None:
    done = megamask("doctor", "--folder", tmp_path, "--json")
    assert done.code == 0, done.stderr
    answer = done.json
    assert answer["fit"] and answer["versions"]["torch"]
    assert {check["name"] for check in answer["checks"]} >= {"storage", "clock", "shared memory", "all-reduce"}
    reasons = {feature["name"]: feature["reason"] for feature in answer["features"]}
    assert "Transformer Engine layers (device.layers=auto)" in reasons
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_space_ends_with_70_and_names_the_check(tmp_path: Path) -> None:
    done = megamask("doctor", "--folder", tmp_path, "--host-only", "--needed-gb", "1e9")
    assert done.code == 70
    assert "FAIL free space" in done.stdout and done.stdout.strip().endswith("not fit: free space")

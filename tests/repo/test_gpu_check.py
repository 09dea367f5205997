"""tools/gpu_check.sh, rehearsed on the CPU: every leg runs, ends by itself, and records what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
ABSENT = ("crc32c", "mlflow", "omegaconf", "webdataset", "obstore", "datasketch", "matplotlib")
"""Packages that a machine with a GPU often lacks, and that no leg but `cli` may need."""

pytestmark = pytest.mark.multiprocess


def rehearse(out: Path, *arguments: str, hidden: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": "" if hidden is None else str(hidden)}
    command = [str(SCRIPT), str(out), "--rehearse", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def legs_of(out: Path) -> dict[str, dict[str, Any]]:
    return {leg["leg"]: leg for leg in json.loads((out / "summary.json").read_text())["legs"]}


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    """A folder in which the packages cannot be imported."""
    for name in ABSENT:
        (tmp_path / "hidden" / name).mkdir(parents=True)
        (tmp_path / "hidden" / name / "__init__.py").write_text(f"raise ImportError('{name} is hidden')")
    return tmp_path / "hidden"


@pytest.mark.promise("`tools/gpu_check.sh --rehearse` runs on a CPU what a GPU will be asked.")
@pytest.mark.timeout(900)
def test_legs_run_without_the_packages_that_a_gpu_machine_lacks(tmp_path: Path, hidden: Path) -> None:
    chosen = ["machine", "tests", "formats_1.7b"]
    done = rehearse(tmp_path / "out", *chosen, hidden=hidden)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: leg["state"] for name, leg in legs_of(tmp_path / "out").items()} == dict.fromkeys(chosen, "passed")
    bench = json.loads((tmp_path / "out" / "formats_1.7b" / "bench.json").read_text())
    assert set(bench["formats"]) == {"bf16", "tensorwise", "delayed", "blockwise"}
    assert all(arm["visits"][0]["losses"] for arm in bench["formats"].values())
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as packed:
        assert {"summary.json", "formats_1.7b/bench.json", "tests/junit.xml"} <= set(packed.getnames())


def test_a_failing_leg_stops_none_and_is_run_again(tmp_path: Path) -> None:
    """A Python that only knows how to write records fails every leg; the next call begins with what did not pass."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\nexit 3\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(python)}
    legs = ["trace", "parts"]
    command = [str(SCRIPT), str(out), "--rehearse"]
    done = subprocess.run([*command, *legs], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert {name: (leg["state"], leg["status"]) for name, leg in legs_of(out).items()} == dict.fromkeys(
        legs, ("failed", 3)
    )
    record = json.loads((out / "parts" / "leg.json").read_text())
    (out / "parts" / "leg.json").write_text(json.dumps(record | {"state": "passed"}, indent=1))
    again = subprocess.run([*command, "--within", "1800"], env=environment, capture_output=True, text=True)
    assert "done      parts" in again.stdout and "failed    trace" in again.stdout
    assert "left out  ablate" in again.stdout  # its limit is longer


def test_a_leg_that_does_not_exist_is_refused_before_any_runs(tmp_path: Path) -> None:
    done = rehearse(tmp_path / "out", "machine", "formats")
    assert done.returncode == 2 and "formats: no such leg; allowed: machine" in done.stderr
    assert "Nothing was run" in done.stderr and not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_other_leg_passes_or_says_why_it_was_skipped(tmp_path: Path) -> None:
    chosen = ["formats_8b", "parts", "ablate", "te", "trace", "cli"]
    done = rehearse(tmp_path / "out", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    legs = legs_of(tmp_path / "out")
    assert set(legs) == set(chosen)
    assert {leg["state"] for name, leg in legs.items() if name != "te"} == {"passed"}
    assert legs["te"]["state"] == "passed" or "not installed" in legs["te"]["last_line"]
    rows = json.loads((tmp_path / "out" / "ablate" / "bench.json").read_text())["ablate"]
    assert all(row["visits"] or row.get("skipped") for row in rows.values()), rows
    assert json.loads((tmp_path / "out" / "cli" / "cli.json").read_text())["bf16"]["is_equal"]

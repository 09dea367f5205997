"""A short soak: random faults meet tiny runs, and every continuation is that of the uninterrupted one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.command import ROOT, environment

pytestmark = pytest.mark.multiprocess


@pytest.mark.promise("a run that random faults interrupt continues bit for bit, and its newest checkpoint always loads")
@pytest.mark.parametrize(
    ("num_faults", "options"),
    [
        pytest.param(6, ["--ranks", "1", "--steps", "25"], id="six_faults"),
        pytest.param(200, [], id="two_hundred_faults", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_soak_finds_no_wrong_byte_and_no_checkpoint_that_does_not_load(
    num_faults: int, options: list[str], tmp_path: Path
) -> None:
    report = tmp_path / "faults.json"
    soak = [sys.executable, str(ROOT / "tools" / "fault_soak.py"), "--faults", str(num_faults), "--seed", "11"]
    done = subprocess.run(
        [*soak, *options, "--json", str(report)], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    faults = json.loads(report.read_text())["faults"]
    assert len(faults) == num_faults
    assert not [fault["problems"] for fault in faults if fault["problems"]]
    assert "Wrong bytes: 0. Newest checkpoints that did not load: 0. Wrong ends: 0." in done.stdout

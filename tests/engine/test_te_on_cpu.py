"""Transformer Engine's own Python on a CPU, in an environment that tools/te_on_cpu/setup.sh makes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed: its real Python was NOT tested; see tools/te_on_cpu/setup.sh",
)


def test_every_case_passes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "te_on_cpu" / "check.py"), "--json", str(tmp_path / "cases.json")],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        check=False,
    )
    cases = json.loads((tmp_path / "cases.json").read_text())["cases"]
    assert done.returncode == 0, {name: case for name, case in cases.items() if not case["passed"]}

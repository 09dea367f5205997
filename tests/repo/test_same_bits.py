"""tools/same_bits.py finds two commits equal exactly if their step lines and states are equal bit for bit."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

from support.command import environment

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "same_bits.py"


@pytest.fixture(scope="module")
def same_bits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("same_bits", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_step_comparison_names_step_and_field(same_bits: ModuleType) -> None:
    old = {1: {"loss": 1.0, "seconds": 3}, 2: {"loss": 2.0, "seconds": 4, "mfu": None}}
    assert same_bits.compare_steps(old, {1: {"loss": 1.0, "added": 1}, 2: {"loss": 2.0, "seconds": 9}}) == []
    assert same_bits.compare_steps(old, {1: {"loss": 1.0}, 2: {"loss": 2.0000001}}) == [
        "step 2: loss was 2.0, is 2.0000001"
    ]
    assert same_bits.compare_steps(old, {1: {}}) == ["steps [1, 2] became [1]", "step 1: loss was 1.0, is absent"]


def test_state_comparison_sees_one_bit_and_a_missing_tensor(same_bits: ModuleType) -> None:
    old = {"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float32)}
    assert same_bits.compare_states(old, {name: tensor.copy() for name, tensor in old.items()}) == []
    negative_zero = {"a": np.array([0, -0.0, 0], np.float32), "b": old["b"]}
    assert same_bits.compare_states(old, negative_zero) == ["a differs in 0 of 3 elements"]
    assert same_bits.compare_states(old, {"a": old["a"]}) == ["b is only in the old state"]


def test_state_is_assembled_from_the_pieces_of_all_files(same_bits: ModuleType, tmp_path: Path) -> None:
    whole = np.arange(12, dtype=np.float32).reshape(4, 3)
    pieces = {0: {"w#0": ([0, 0], whole[:2]), "w#1": ([2, 0], whole[2:3, :2])}, 1: {"w#0": ([2, 2], whole[2:3, 2:])}}
    pieces[1]["w#1"] = ([3, 0], whole[3:])
    for rank, entries in pieces.items():
        save_file(
            {key: np.ascontiguousarray(data) for key, (_, data) in entries.items()},
            tmp_path / f"state-{rank:05d}.safetensors",
            metadata={key: json.dumps({"offsets": at, "shape": [4, 3]}) for key, (at, _) in entries.items()},
        )
    assert np.array_equal(same_bits.read_state(tmp_path)["w"], whole)
    (tmp_path / "state-00001.safetensors").unlink()
    with pytest.raises(SystemExit, match="w has 8 of 12 elements"):
        same_bits.read_state(tmp_path)


@pytest.mark.promise("two commits are found equal exactly if step lines and states are equal bit for bit")
@pytest.mark.multiprocess
def test_a_changed_update_is_found_between_two_checkouts(tmp_path: Path) -> None:
    for name in ("platform", "pipelines", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, str(TOOL), str(ROOT), str(tmp_path), "--only", "single_view", "--steps", "3"]

    def compare() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)

    same = compare()
    assert same.returncode == 0, same.stderr
    assert "single_view: equal (3 steps" in same.stdout
    schedules = tmp_path / "platform" / "megamask" / "training" / "schedules.py"
    source = schedules.read_text()
    schedules.write_text(source.replace("def learning_rate(", "def _learning_rate(", 1) + FAULT)
    changed = compare()
    assert changed.returncode == 1, changed.stdout + changed.stderr
    assert "learning_rate was" in changed.stdout
    assert "elements" in changed.stdout


FAULT = """

def learning_rate(*arguments, **named):
    return 1.0001 * _learning_rate(*arguments, **named)
"""

"""The check of a node's GPUs: who is asked, and what each answer of the process that asks means.

No GPU is here: a CPU replaces one in the product, and a script for a probe that finds a fault.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.resilience.preflight import gpus
from megamask.resilience.preflight.finding import answers


def _told(script: str, limit_s: float = 60.0) -> gpus.Finding:
    return gpus.gpus(["-c", script], limit_s)


def test_node_without_a_gpu_is_not_asked() -> None:
    assert gpus.gpu_checks(are_there=lambda: False) == []


@pytest.mark.parametrize(
    ("names", "hidden_by", "expected"),
    [
        (["nvidia0", "nvidiactl"], None, True),
        (["nvidia0"], "0,1", True),
        (["nvidia0"], "", False),
        (["nvidia0"], "NoDevFiles", False),
        (["nvidiactl", "nvidia-uvm"], None, False),
        ([], None, False),
    ],
)
def test_gpu_is_visible_by_its_device_file(
    names: list[str], hidden_by: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden_by is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden_by)
    assert gpus.visible(tmp_path) is expected


@pytest.mark.multiprocess
def test_exact_product_passes() -> None:
    [check] = gpus.gpu_checks(
        are_there=lambda: True, probe=["-P", "-m", "megamask.engine.device_probe", "cpu"], limit_s=120
    )
    [answer] = answers([check])
    assert answer.finding.outcome == "pass", answer.finding.message
    assert answer.finding.message == "1 GPUs: products are exact"


def test_wrong_product_fails_and_names_its_gpu() -> None:
    rows = [
        {"device": "cuda:0", "outcome": "pass", "message": "exact"},
        {"device": "cuda:3", "outcome": "fail", "message": "1 of 147456 entries are wrong"},
    ]
    found = _told(f"import json; print('a line of a library'); print(json.dumps({rows!r}))")
    assert (found.outcome, found.message) == ("fail", "cuda:3: 1 of 147456 entries are wrong")


@pytest.mark.parametrize(
    ("script", "outcome", "reported"),
    [
        ("raise SystemExit('no module named torch')", "warn", "no module named torch"),
        ("import os; os._exit(9)", "warn", "exit code 9"),
        ("print('[]')", "skip", "without CUDA"),
    ],
)
def test_what_no_gpu_said_blames_none(script: str, outcome: str, reported: str) -> None:
    found = _told(script)
    assert found.outcome == outcome
    assert reported in found.message


def test_probe_that_does_not_end_blames_no_gpu() -> None:
    found = _told("import time; time.sleep(60)", limit_s=0.2)
    assert found.outcome == "warn"
    assert "within 0.2 s" in found.message
